#!/bin/sh
# A messaging application in one page: two people talk through flowbridge, with nothing but curl.
#
#   BRIDGE=http://localhost:8090 examples/messaging.sh
#
# It shows what the guide "How to use the client-server API" ends with: registration and login, creating and joining
# a room, sending messages, a live event stream, the member list and the history. All paths are the guide's own. The
# homeserver must let people register (the one of `flowbridge demo` does). Exit code 1: a step failed, and stderr says
# which.
set -eu

api=${BRIDGE:-http://localhost:8090}/_matrix/client/api/v1
suffix=$(date +%s)$$ # so that it can be run again: names are taken for good
password=wordpass-$suffix
farewell="Goodbye, Alice."

step() {
    printf '\n== %s\n' "$*"
}

# request METHOD PATH TOKEN [BODY]: the answer's JSON on one line; ends the program when it is an error.
request() {
    method=$1 path=$2 token=$3
    shift 3
    [ $# -eq 0 ] || set -- -d "$1"
    [ -z "$token" ] || set -- -H "Authorization: Bearer $token" "$@"
    answer=$(curl -sS -m 60 -X "$method" -w '\n%{http_code}' "$@" "$api$path") || {
        echo "FAILED: $method $path: no answer" >&2
        return 1
    }
    status=${answer##*
}
    answer=${answer%
*}
    case $status in
    2??) printf '%s' "$answer" | tr -d '\n\r' && echo ;;
    *)
        echo "FAILED: $method $path: HTTP $status: $answer" >&2
        return 1
        ;;
    esac
}

# field NAME: the text of this key of the JSON on stdin; the last one when there are several.
field() {
    sed -nE 's/.*"'"$1"'" *: *"([^"]*)".*/\1/p'
}

# encode TEXT: for a path or a query.
encode() {
    printf '%s\n' "$1" | sed -e 's/%/%25/g' -e 's/!/%21/g' -e 's/#/%23/g' -e 's/\$/%24/g' -e 's/&/%26/g' \
        -e 's/+/%2B/g' -e 's,/,%2F,g' -e 's/:/%3A/g' -e 's/=/%3D/g' -e 's/?/%3F/g' -e 's/@/%40/g'
}

# show PREFIX: the messages and memberships among the events on stdin, one on each line.
show() {
    sed -e 's/} *, *{/}\
{/g' | sed -nE '
        /"type" *: *"m\.room\.message"/ {
            h
            s/.*"sender" *: *"([^"]*)".*/\1/
            x
            s/.*"body" *: *"(([^"\\]|\\.)*)".*/\1/
            x
            G
            s/\n/: /
            p
        }
        /"type" *: *"m\.room\.member"/ {
            h
            s/.*"state_key" *: *"([^"]*)".*/\1/
            x
            s/.*"membership" *: *"([^"]*)".*/\1/
            x
            G
            s/\n/ -> /
            p
        }' | sed "s/^/$1/"
}

# account NAME: registers, logs in as any device would later, and prints the token of that login.
account() {
    request POST /register "" "{\"user_id\": \"$1\", \"password\": \"$password\"}" >/dev/null
    login=$(request POST /login "" "{\"type\": \"m.login.password\", \"user\": \"$1\", \"password\": \"$password\"}")
    printf '%s\n' "$login" | field access_token
}

# say TOKEN TEXT: a message to the room.
say() {
    request POST "/rooms/$room/send/m.room.message" "$1" "{\"msgtype\": \"m.text\", \"body\": \"$2\"}" >/dev/null
}

# listen TOKEN FROM: prints events as they arrive, until somebody says goodbye; fails when nobody does.
listen() {
    from=$2
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do
        events=$(request GET "/events?timeout=5000&from=$(encode "$from")" "$1")
        printf '%s\n' "$events" | show '   live | '
        case $events in
        *"$farewell"*) return 0 ;;
        esac
        from=$(printf '%s\n' "$events" | field end)
    done
    echo "FAILED: GET /events: the last message did not arrive" >&2
    return 1
}

step "Which ways to log in are there?"
request GET /login ""

step "Alice and Bob register and log in"
alice=$(account "alice-$suffix")
bob=$(account "bob-$suffix")
[ -n "$alice" ] && [ -n "$bob" ] || { echo "FAILED: POST /login: no access_token in the answer" >&2; exit 1; }
echo "alice-$suffix and bob-$suffix are there"

step "Alice creates a room that has an alias"
created=$(request POST /createRoom "$alice" "{\"room_alias_name\": \"tutorial-$suffix\", \"preset\": \"public_chat\"}")
room=$(printf '%s\n' "$created" | field room_id)
alias=$(printf '%s\n' "$created" | field room_alias)
[ -n "$room" ] && [ -n "$alias" ] || { echo "FAILED: POST /createRoom: $created" >&2; exit 1; }
echo "$alias is $room"
room=$(encode "$room")

step "Alice listens to what happens from now on"
events=$(request GET "/events?timeout=0" "$alice")
listen "$alice" "$(printf '%s\n' "$events" | field end)" &
listener=$!
trap 'kill "$listener" 2>/dev/null || :' EXIT # a step that fails leaves no listener behind

step "Bob joins the room by its alias; they talk"
request POST "/join/$(encode "$alias")" "$bob" '{}' >/dev/null
say "$bob" "Hello Alice!"
say "$alice" "Hello Bob. This is my first room."
say "$bob" "$farewell"
wait "$listener"

step "Who is in the room?"
members=$(request GET "/rooms/$room/members" "$alice")
printf '%s\n' "$members" | show '   '

step "What was said, the newest first?"
history=$(request GET "/rooms/$room/messages?dir=b&limit=20" "$bob")
printf '%s\n' "$history" | show '   '

step "Done."
