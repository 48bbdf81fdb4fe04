"""mqtts: the broker is checked against `ca_file`, and the node shows its own certificate."""

from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, a server's certificate for localhost, a client's, and another CA that signed none of them."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN=test {name}",
                "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
    (folder / "server.ext").write_text("subjectAltName=DNS:localhost\n")
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth\n")
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key",
                "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
    return folder


# paho leaves the socket of a failed handshake to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket")
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket")
@pytest.mark.parametrize(
    ("ca", "shows", "connects"), [("ca", True, True), ("other", True, False), ("ca", False, False)]
)
async def test_certificates(kit, tmp_path, certificates, ca, shows, connects):
    options = {"ca_file": certificates / f"{ca}.pem"}
    if shows:
        options |= {"cert_file": certificates / "client.pem", "key_file": certificates / "client.key"}
    with kit.mosquitto(tmp_path / "m", tls=certificates) as broker:
        async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, broker.url, **options) as publisher:

            async def settled():
                status = await publisher.status()
                return status["connected"] or status["error"]

            result = await kit.until(settled, "a connection or an error")
            assert (result is True) == connects, result
            assert connects or broker.url in result
