#!/usr/bin/env bash
# Fetch ONNX Runtime's C headers (Debian package libonnxruntime-dev) into the user's cache; nothing is installed.
#
#   plugins/fetch_headers.sh            print the include folder, fetching the package when no folder has the headers
#   plugins/fetch_headers.sh --locate   only print the include folder; exit 1 when there is none
#
# Search order: $ORT_INCLUDE_DIR, /usr/include/onnxruntime, the user's cache. The package comes from the machine's own
# configured archive; where its release has no such package, from a newer suite of the same archive.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

package=libonnxruntime-dev
header=onnxruntime_c_api.h
cache="${XDG_CACHE_HOME:-$HOME/.cache}/qpipe/onnxruntime-headers"

locate() {
    local dir
    for dir in "${ORT_INCLUDE_DIR:-}" /usr/include/onnxruntime "$cache"; do
        if [ -n "$dir" ] && [ -r "$dir/$header" ]; then
            printf '%s\n' "$dir"
            return 0
        fi
    done
    return 1
}

give_up() {
    {
        echo "plugin-headers: $1"
        echo "  expected : $header of ONNX Runtime 1.18 or newer (the Python wheels do not carry it)"
        echo "  do       : take include/ from any ONNX Runtime C/C++ archive or package and set ORT_INCLUDE_DIR to the"
        echo "             folder that holds $header; on Debian 13 or Ubuntu 24.10 and newer: apt-get install $package"
    } >&2
    exit 5
}

# apt with lists and cache of its own; arguments: source list file ("" = the machine's own sources), then apt-get's.
apt_get() {
    local list=$1
    shift
    local options=(-qq -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o Acquire::Languages=none
        -o APT::Sandbox::User=root -o Debug::NoLocking=1)
    if [ -n "$list" ]; then
        options+=(-o "Dir::Etc::SourceList=$list" -o Dir::Etc::SourceParts=-)
    fi
    apt-get "${options[@]}" "$@"
}

# Write a source list for `suite` with the archive and component of the machine's own first entry.
derive_list() {
    local suite=$1 component=$2 uri keyring
    uri=$(apt_get "" indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    [ -n "$uri" ] || return 1
    keyring=/usr/share/keyrings/$distribution-archive-keyring.gpg
    echo "deb ${keyring:+$([ -r "$keyring" ] && echo "[signed-by=$keyring]")} $uri $suite $component" >"$work/newer.list"
}

download() {
    (cd "$work" && apt_get "$1" download "$package" >/dev/null 2>&1) && ls "$work/$package"_*.deb >/dev/null 2>&1
}

fetch() {
    local newer entry
    apt_get "" update >/dev/null 2>&1 || true
    download "" && return 0
    case "$distribution" in
        debian) newer="trixie/main sid/main" ;;
        ubuntu) newer="devel/universe" ;;
        *) give_up "this machine's package archive ($distribution) has no $package" ;;
    esac
    for entry in $newer; do
        derive_list "${entry%/*}" "${entry#*/}" || give_up "no package source is configured on this machine"
        apt_get "$work/newer.list" update >/dev/null 2>&1 || continue
        download "$work/newer.list" && return 0
    done
    give_up "$package could not be downloaded (no network, or the archive no longer carries it)"
}

unpack() {
    dpkg -x "$work/$package"_*.deb "$work/root"
    local found
    found=$(find "$work/root" -name "$header" -print -quit)
    [ -n "$found" ] || give_up "$package holds no $header"
    mkdir -p "$(dirname "$cache")"
    rm -rf "$cache.new.$$"
    cp -r "$(dirname "$found")" "$cache.new.$$"
    rm -rf "$cache"
    # Another run may have put the folder there meanwhile; theirs is as good as ours.
    mv -T "$cache.new.$$" "$cache" 2>/dev/null || rm -rf "$cache.new.$$"
}

if locate; then exit 0; fi
if [ "${1:-}" = "--locate" ]; then exit 1; fi
command -v apt-get >/dev/null && command -v dpkg >/dev/null || give_up "this machine has no apt"
distribution=$(. /etc/os-release && echo "$ID")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
fetch
unpack
locate
