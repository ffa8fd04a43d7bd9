#!/bin/sh
# The contents in paddle.h have the right line numbers, and whoever breaks its order, or forgets a tag, is told.
. tests/script.sh
copy=build/tmp/contents.h

# broken NAME MESSAGE SED..: an edit of the header that tests/contents must refuse with the message.
broken() {
    what=$1 message=$2
    shift 2
    sed "$@" paddle.h >"$copy"
    tests/contents --check "$copy" >"$log" 2>&1
    refused=$?
    [ $refused != 0 ] && grep -q "$message" "$log"
    result $? "$what"
}

check 'paddle.h: contents' tests/contents --check paddle.h
broken 'another line' 'contents are stale' '400i\
'
broken 'a tag twice' 'the tag >>layer:NAME fc stands here again' 's|^/\* ---- >>layer:pool|/* ---- >>layer:fc|'
broken 'a layer without a tag' 'layer type pool has no tag' 's|^/\* ---- >>layer:pool ---- \*/||'
broken 'another order' 'files is elsewhere' 's|^/\* >>files.h|/* >>x.h|; s|^/\* >>status.h|/* >>files.h|; s|^/\* >>x.h|/* >>status.h|'
finish
