#!/bin/sh
# Make the passwords of the stack, once; what is there stays. Files in secrets/ are read by users of the containers, so
# the folder, and not they, keeps the others of this machine out.
set -eu
cd "$(dirname "$0")"
umask 022
mkdir -p models secrets
chmod 0700 secrets
for name in agent-password hub-password grafana-password; do
  [ -s "secrets/$name" ] || od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "secrets/$name"
done
sed -e "s/@agent-password@/$(cat secrets/agent-password)/" -e "s/@hub-password@/$(cat secrets/hub-password)/" \
  nats/users.conf.in > secrets/nats-users.conf
