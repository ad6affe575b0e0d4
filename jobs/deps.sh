#!/bin/sh
# `make deps`: installs the Debian packages named in DEBIAN_PACKAGES that are missing, or says which they are.
# Plain sh, because a bare machine may have nothing else. Touches no network when nothing is missing.
set -eu
if ! command -v dpkg-query >/dev/null 2>&1; then
  echo "This is not a Debian system. Install what corresponds to these packages, then add DEPS=no to the make command:" >&2
  echo "  $DEBIAN_PACKAGES" >&2
  exit 1
fi
missing=
for package in $DEBIAN_PACKAGES; do
  dpkg-query -W -f='${Status}\n' "$package" 2>/dev/null | grep -q ' ok installed$' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ]; then
  as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
  as_root=sudo
else
  echo "These Debian packages are missing; install them as root, then run make again:" >&2
  echo "  apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
echo "Installing Debian packages:$missing"
$as_root apt-get update
# shellcheck disable=SC2086 # the list is split on purpose
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --no-upgrade $missing
