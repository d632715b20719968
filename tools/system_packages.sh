#!/bin/sh
# System libraries that pip cannot bring: libpotrace (fast tracing) and what Skia links to.
# Nothing here is fatal: without them the slower parts from PyPI do the work and say so.
missing=""
has() { ldconfig -p 2>/dev/null | grep -q "$1" || ls /usr/lib/*/"$1"* >/dev/null 2>&1; }
has libpotrace.so || missing="$missing libpotrace0"
has libGL.so.1 || missing="$missing libgl1"
has libEGL.so.1 || missing="$missing libegl1"
has libexpat.so.1 || missing="$missing libexpat1"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing system packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; then
        exit 0
    fi
fi
echo "note: not installed:$missing (tracing and rasterising fall back to slower PyPI packages);"
echo "      as root: apt-get install --no-install-recommends$missing"
