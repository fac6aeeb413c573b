#!/usr/bin/env bash
# Debian's Chromium, for tests/test_report_browser.py. Where it cannot be had, says so and ends well: its tests skip.
set -uo pipefail
command -v chromium >/dev/null && exit 0
apt=(timeout 180 apt-get)  # a machine without a network may wait for minutes
[ "$(id -u)" = 0 ] || apt=(sudo -n timeout 180 apt-get)
if command -v apt-get >/dev/null && "${apt[@]}" update -qq >/dev/null 2>&1 &&
	DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends chromium >/dev/null 2>&1; then
	echo "chromium: installed"
else
	echo "chromium: not to be had here (no apt-get, not root, or no network); the report's browser tests skip"
fi
