#!/bin/sh
# Makes the secrets that compose.yaml names, and keeps those that are there. Asks for the bot's access token.
# The files are readable for the containers' users; the folder is closed to everybody else on this host.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_'; }
keep() { [ -s "secrets/$1" ] || { printf '%s' "$2" > "secrets/$1"; echo "made secrets/$1"; }; chmod 644 "secrets/$1"; }
if [ ! -s secrets/access-token ]; then
    printf "The bot's access token (not shown): " >&2
    [ ! -t 0 ] || stty -echo
    IFS= read -r token
    [ ! -t 0 ] || { stty echo; echo >&2; }
    [ -n "$token" ] || { echo 'no token, nothing made' >&2; exit 2; }
    keep access-token "$token"
fi
keep access-token ''
keep secret-key "$(random)"
keep postgres-password "$(random | tr -d '=')"
keep database-url "postgresql+psycopg://flowbridge:$(cat secrets/postgres-password)@postgres/flowbridge"
