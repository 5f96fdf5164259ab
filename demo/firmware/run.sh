#!/bin/sh
# Thermostat firmware @VERSION@. `run --boot SLOT` starts the board, `run --health SLOT` is its own verdict.
set -eu
action=$1
slot=$2

fail() {
    echo "$1"
    exit 1
}

# A number of config.json, which holds one key a line.
number() {
    while read -r key value; do
        if [ "$key" = "\"$1\":" ]; then
            echo "${value%,}"
            return
        fi
    done <"$slot/config.json"
    fail "config.json has no $1"
}

serial=0
if [ -r "$GROUNDSWELL_STATE/serial" ]; then
    read -r serial <"$GROUNDSWELL_STATE/serial"
fi
digit=${serial#"${serial%?}"}
case $digit in
[0-9]) ;;
*) digit=0 ;;
esac

boot() {
    [ -s "$slot/payload.bin" ] || fail "the payload is missing"
    sleep "$(number self_test_s)"
    # Boards kick the watchdog at different moments: spread them by the last digit of the serial number.
    slots=$(number watchdog_slots)
    period=$((60000 / (slots - digit)))
    echo "thermostat @VERSION@: watchdog every ${period#-} ms"
}

health() {
    # One record each time, in the log channel of the board; a rotated channel begins again when it is full.
    records=0
    if [ -r "$GROUNDSWELL_DATA/records" ]; then
        read -r records <"$GROUNDSWELL_DATA/records" || records=0
    fi
    records=$((records + 1))
    limit=$(number log_limit)
    channel=$((digit % $(number log_channels)))
    if [ "$records" -gt "$limit" ] && [ "$channel" -lt "$(number log_rotated_channels)" ]; then
        records=1
    fi
    echo "$records" >"$GROUNDSWELL_DATA/records"
    [ "$records" -le "$limit" ] || fail "log of channel $channel is full: $records records, limit $limit"
    echo "healthy"
}

case $action in
--boot) boot ;;
--health) health ;;
*) fail "unknown action $action" ;;
esac
