#!/bin/sh
# Installs a millhand bundle on a node without a network. Nothing of the bundle is run before the plant's signature and
# every hash have been checked; nothing is changed without --yes; killed at any moment, it can be run again.
#
#   sh install.sh FILE --key plant.public.pem [--yes] [--downgrade]
#   sh install.sh FILE --fingerprint 40-HEX-DIGITS [--yes] [--downgrade]
#
# This script decides what is trusted: take it and the key from where you trust them, not from where the bundle lay.
set -u
LC_ALL=C
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
DEBIAN_FRONTEND=noninteractive
PYTHONDONTWRITEBYTECODE=1
export LC_ALL PATH DEBIAN_FRONTEND PYTHONDONTWRITEBYTECODE
umask 022

STAGED=/var/cache/millhand-bundle
USAGE="sh install.sh FILE --key plant.public.pem [--yes] [--downgrade]"
LIBRARIES=/usr/local/lib/millhand/site-packages
work=
staging=

say() { printf '%s\n' "$*"; }
refuse() { # what is wrong, what to do
  printf 'Error: %s\nTry: %s\n' "$1" "$2" >&2
  exit 1
}
clean() {
  [ -z "$work" ] || rm -rf "$work"
  [ -z "$staging" ] || rm -rf "$STAGED"
}
field() { sed -n "s/^$1: //p" "$work/MANIFEST"; }
section() { sed -n "/^$1:\$/,/^[A-Z]/s/^ //p" "$work/MANIFEST"; }
free_kb() { df -Pk "$1" | awk 'NR == 2 { print $4 }'; }
disk() { df -Pk "$1" | awk 'NR == 2 { print $6 }'; }
kb() { say $((($1 + 1023) / 1024)); }

read_arguments() {
  bundle='' key='' fingerprint='' yes='' downgrade=''
  while [ $# -gt 0 ]; do
    case $1 in
      --key) key=${2-} && shift ;;
      --fingerprint) fingerprint=$(printf %s "${2-}" | tr -d ' ' | tr a-f A-F) && shift ;;
      --yes) yes=1 ;;
      --downgrade) downgrade=1 ;;
      -h | --help) say "$USAGE" && exit 0 ;;
      -*) refuse "option '$1' is not known" "$USAGE" ;;
      *) bundle=$1 ;;
    esac
    [ $# -eq 0 ] || shift
  done
  [ -f "$bundle" ] && [ -r "$bundle" ] || refuse "there is no bundle '$bundle'" "name its file"
  if [ -n "$key" ]; then
    fingerprint=$(fingerprint_of "$key")
    [ -n "$fingerprint" ] || refuse "'$key' is no public key of a plant" "the file NAME.public.pem of millhand key new"
  fi
  printf %s "$fingerprint" | grep -Eqx '[0-9A-F]{40}' ||
    refuse "no key of the plant is named" "--key plant.public.pem, or --fingerprint with its 40 hex digits"
}

# The OpenPGP fingerprint (RFC 9580, 5.5.4) of an Ed25519 public key in PEM (RFC 8410), made one second after the epoch.
fingerprint_of() {
  der=$(sed '/-----/d' "$1" 2>/dev/null | base64 -d 2>/dev/null | od -An -v -tx1 | tr -d ' \n')
  case $der in 302a300506032b6570032100*) [ ${#der} -eq 88 ] || return 0 ;; *) return 0 ;; esac
  {
    printf '\231\000\063\004\000\000\000\001\026\011\053\006\001\004\001\332\107\017\001\001\007\100'
    sed '/-----/d' "$1" | base64 -d | tail -c 32
  } | sha1sum | cut -c 1-40 | tr a-f A-F
}

verify() {
  work=$(mktemp -d /run/millhand-bundle.XXXXXX 2>/dev/null || mktemp -d 2>/dev/null) ||
    refuse "neither /run nor /tmp can be written" "make room, or mount them writable"
  sum=$(head -c -72 "$bundle" | sha256sum | cut -c 1-64)
  printf 'sha256 %s\n' "$sum" >"$work/trailer"
  tail -c 72 "$bundle" | cmp -s - "$work/trailer" ||
    refuse "bundle '$bundle' is damaged or cut short" "carry it here again"
  tar -xf "$bundle" --occurrence=1 --no-same-owner -C "$work" MANIFEST MANIFEST.sig KEY.pgp 2>/dev/null ||
    refuse "'$bundle' is no bundle of millhand" "name a file that 'make bundle' made"
  if command -v gpgv >/dev/null; then
    gpgv --homedir "$work" --keyring "$work/KEY.pgp" --status-fd 1 "$work/MANIFEST.sig" "$work/MANIFEST" 2>/dev/null |
      grep -q "^\[GNUPG:\] VALIDSIG $fingerprint "
  elif command -v sqv >/dev/null; then
    [ "$(sqv --keyring "$work/KEY.pgp" --signature-file "$work/MANIFEST.sig" "$work/MANIFEST" 2>/dev/null)" = "$fingerprint" ]
  else
    refuse "neither gpgv nor sqv is here, one of which every Debian and Ubuntu has" "install the package gpgv or sqv"
  fi || refuse "bundle '$bundle' is not signed by the key $fingerprint" "carry another bundle, or name another key"
  [ "$(head -n 1 "$work/MANIFEST")" = "millhand bundle 1" ] ||
    refuse "the bundle's form is not known here" "take the install.sh that came with it"
  section Files >"$work/signed"
  # Each file goes through sha256sum and nowhere else: nothing is written before everything is known to be signed.
  tar -xf "$bundle" -C "$work" --to-command='echo "$(sha256sum | cut -c 1-64) $TAR_SIZE $TAR_FILENAME"' 2>/dev/null |
    tail -n +4 | cmp -s - "$work/signed" ||
    refuse "a file of bundle '$bundle' is not what the plant has signed" "carry another bundle"
  tar -xf "$bundle" --occurrence=1 --no-same-owner -C "$work" debs/Packages 2>/dev/null &&
    grep -Fqx "$(sha256sum "$work/debs/Packages" | cut -c 1-64) $(wc -c <"$work/debs/Packages") debs/Packages" "$work/signed" ||
    refuse "bundle '$bundle' has no index of its packages" "carry another bundle"
}

check_node() {
  version=$(field Package) system=$(field System) target=$(field Target)
  here=$(. /etc/os-release && say "$ID ${VERSION_ID-}")
  [ "$here" = "$system" ] || refuse "the bundle is for $system, this is $here" "make bundle with SYSTEM for this node"
  [ "$(dpkg --print-architecture)" = "$(field Architecture)" ] ||
    refuse "the bundle is for $(field Architecture), this is $(dpkg --print-architecture)" "make bundle with another TARGET"
  have=$(installed millhand)
  [ -z "$have" ] || [ -n "$downgrade" ] || dpkg --compare-versions "$have" le "$version" ||
    refuse "millhand $have is installed, the bundle has the older $version" "--downgrade, if you mean it"
  for folder in /usr /usr/local /var/lib /var/cache; do
    [ -w "$folder" ] || refuse "'$folder' cannot be written" "run as root, on a file system that is mounted writable"
  done
  [ ! -d "$LIBRARIES" ] || [ -f "$LIBRARIES/.bundle" ] || ! grep -q ' wheels/' "$work/signed" ||
    refuse "'$LIBRARIES' was not laid by a bundle" "move it away; bundles exchange it as a whole"
  check_room
}

check_room() {
  staged=$(kb "$(field Staged-Bytes)") below_usr=$(kb "$(field System-Bytes)") below_var=$(kb "$(field Data-Bytes)")
  below_var=$((below_var + staged + 65536)) # the store beside it must never find the disk full
  if [ "$(disk /usr)" = "$(disk /var/cache)" ]; then
    below_usr=$((below_usr + below_var))
  fi
  for need in "/var/cache $below_var" "/usr $below_usr"; do
    left=$(free_kb "${need% *}")
    [ "$left" -ge "${need#* }" ] ||
      refuse "the disk of ${need% *} has $((left / 1024)) MB left, the bundle needs $((${need#* } / 1024)) MB" "make room"
  done
}

installed() { # the version of a package that is installed whole, else nothing
  dpkg-query -W -f '${db:Status-Abbrev}${Version}\n' "$1" 2>/dev/null | sed -n 's/^[ihr]i //p' | head -n 1
}

half() { # whether a package is neither whole nor absent: a dpkg that was killed is not done with it
  for state in $(dpkg-query -W -f '${db:Status-Status} ' "$1" 2>/dev/null); do
    case $state in installed | not-installed | config-files) ;; *) return 0 ;; esac
  done
  return 1
}

torn() { # whether dpkg was cut off while it unpacked a package, of the bundle's version or an older one
  dpkg-query -W -f '${db:Status-Eflag} ${db:Status-Status}\n' "$1" 2>/dev/null | grep -Eq '^reinstreq | half-installed$' &&
    dpkg --compare-versions "$(dpkg-query -W -f '${Version}' "$1")" le "$2"
}

# The packages of the bundle that this node needs, with their versions. apt decides: what is here and does stays as it
# is, so that what hangs on it goes on to fit. It changes nothing (-s), needs no file of a package, and sees no archive
# but the bundle's, no settings of the node's own about archives, and what dpkg knows: after a kill that is more than
# lies in dpkg's own file.
choose() {
  : >"$work/chosen"
  wanted='' unfinished=''
  while read -r _ package new; do
    ! half "$package" || unfinished=1
    have=$(installed "$package")
    case $package in
      millhand) [ "$have" = "$new" ] || wanted="$wanted millhand=$new" ;;
      *) [ -n "$have" ] || wanted="$wanted $package" ;;
    esac
  done <"$work/packages"
  [ -n "$wanted" ] || return 0
  mkdir "$work/none"
  dpkg-query --status >"$work/status"
  # shellcheck disable=SC2086  # they are words
  if apt-get -s -q -f --no-remove --no-install-recommends --allow-downgrades --with-source "$work/debs/Packages" \
    -o Debug::NoLocking=1 -o Dir::Log="$work" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
    -o Dir::State::status="$work/status" -o Dir::State::lists="$work/none" -o APT::Default-Release= \
    -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/none" \
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts="$work/none" install $wanted >"$work/apt" 2>&1; then
    sed -n 's/^\(Inst\|Conf\) \([^ :]*\)[^(]*(\([^ )]*\).*/\2 \3/p' "$work/apt" >"$work/chosen"
    while read -r _ package new; do # apt plans as if these were whole
      ! torn "$package" "$new" || say "$package $new"
    done <"$work/packages" >>"$work/chosen"
  elif [ -n "$unfinished" ] || ! command -v apt-get >/dev/null; then
    # apt may refuse to plan with what is half installed: all that are older here go along, which fits in itself.
    while read -r _ package new; do
      have=$(installed "$package")
      [ -n "$have" ] && dpkg --compare-versions "$have" ge "$new" || say "$package $new"
    done <"$work/packages" >"$work/chosen"
    [ "$(installed millhand)" = "$version" ] || say "millhand $version" >>"$work/chosen"
  else
    sed 's/^/  /' "$work/apt" >&2
    refuse "the packages do not fit those that are installed" "see above; install or remove what apt names"
  fi
}

plan() {
  say "Bundle    millhand $(field Version) for $target, of $(field Date), signed by $fingerprint"
  section Debs >"$work/packages"
  choose
  : >"$work/debs.list"
  while read -r path package new; do
    grep -Fqx "$package $new" "$work/chosen" || continue
    have=$(installed "$package")
    say "Package   $package $new${have:+, in place of $have}"
    say "$STAGED/$path" >>"$work/debs.list"
  done <"$work/packages"
  sed -n 's|^[0-9a-f]* [0-9]* wheels/\(.*\)|Library   \1|p' "$work/signed"
  sed -n 's|^[0-9a-f]* [0-9]* data/\(.*\)|Data      \1|p' "$work/signed"
  case $target in
    orin) tr -d '\000' 2>/dev/null </proc/device-tree/model | grep -q Orin || say "Note      no Jetson Orin is seen here" ;;
    a100) [ -e /dev/nvidiactl ] || say "Note      no NVIDIA driver is seen here: models are served by the CPU" ;;
  esac
  say "Where the same package, library or model is there already, it is left alone. What was recorded is never touched."
}

stage() {
  staging=1
  rm -rf "$STAGED" && mkdir -m 755 "$STAGED" || refuse "'$STAGED' cannot be made" "mend the disk"
  head -c -72 "$bundle" | tar -xf - --no-same-owner -C "$STAGED" 2>/dev/null && cmp -s "$work/MANIFEST" "$STAGED/MANIFEST" ||
    refuse "the bundle cannot be unpacked into '$STAGED'" "make room, or carry it here again"
  sed 's/ [0-9]* /  /' "$work/signed" >"$work/sums"
  (cd "$STAGED" && sha256sum --check --strict --quiet "$work/sums" >/dev/null 2>&1) &&
    [ "$(find "$STAGED" -type f | wc -l)" -eq "$(($(wc -l <"$work/sums") + 3))" ] ||
    refuse "the bundle has changed while it was read" "copy it to the node's own disk first"
}

act() {
  broken=$(dpkg --audit)
  if [ -s "$work/debs.list" ]; then
    say "Installing $(wc -l <"$work/debs.list") packages; on a slow disk this takes minutes."
    # shellcheck disable=SC2046
    dpkg --install --force-confold $(cat "$work/debs.list") >"$work/dpkg" 2>&1 || {
      cat "$work/dpkg" >&2
      refuse "dpkg could not install the packages" "mend what it says, and run this again"
    }
  fi
  if [ -n "$broken" ] && { [ -s "$work/debs.list" ] || [ -n "$unfinished" ]; }; then
    dpkg --configure --pending >/dev/null 2>&1 || say "Note      other packages are still broken: dpkg --audit"
  fi
  millhand bundle lay "$STAGED" >"$work/laid" || exit 1
  cat "$work/laid"
  if [ ! -s "$work/debs.list" ] && [ ! -s "$work/laid" ] && [ -z "$unfinished" ]; then
    say "Nothing had to be changed."
  elif [ -d /run/systemd/system ]; then
    systemctl try-restart millhand.service
  fi
}

main() {
  read_arguments "$@"
  trap clean EXIT
  trap 'exit 130' INT TERM HUP
  verify
  if [ -n "$yes" ]; then
    exec 9</var/lib/dpkg
    flock -n 9 || refuse "another install is under way" "wait until it has ended"
  fi
  check_node
  plan
  if [ -z "$yes" ]; then
    say "Nothing has been changed. To install it, give --yes."
    exit 0
  fi
  stage
  act
  say "millhand $(field Version) is installed."
  [ -e /etc/millhand/millhand.toml ] || say "Next: sudo millhand setup"
}

main "$@"
