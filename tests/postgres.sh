#!/usr/bin/env bash
# Run a command with a fresh PostgreSQL on loopback: postgres.sh COMMAND...
# The server's address is in $MEZZOTINT_POSTGRES; server and data are gone afterwards.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"  # runuser
find_server() { ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1; }
if [ -z "$(find_server)" ]; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq >&2
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql >&2
fi
bin=$(find_server)
folder=$(mktemp -d)
as() { if [ "$(id -u)" = 0 ]; then chown -R postgres "$folder"; runuser -u postgres -- "$@"; else "$@"; fi; }
stop() { as "$bin/pg_ctl" -D "$folder/data" -m immediate stop >/dev/null 2>&1 || true; rm -rf "$folder"; }
trap stop EXIT
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
chmod 755 "$folder"
as "$bin/initdb" -D "$folder/data" -U mezzotint -A trust -E UTF8 --locale=C >/dev/null
as "$bin/pg_ctl" -D "$folder/data" -w -l "$folder/log" \
  -o "-h 127.0.0.1 -p $port -k $folder" start >/dev/null
as "$bin/createdb" -h 127.0.0.1 -p "$port" -U mezzotint study
export MEZZOTINT_POSTGRES="postgresql+psycopg://mezzotint@127.0.0.1:$port/study"
"$@"
