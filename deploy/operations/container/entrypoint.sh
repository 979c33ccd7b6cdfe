#!/bin/sh
# Without a command the image takes the flags of TGI's launcher, as TGI's image does; with one it is
# the roundhouse command: "docker run IMAGE gateway --router HOST:50051".
case "${1-}" in
    "" | -*) exec text-generation-launcher "$@" ;;
    roundhouse | text-generation-launcher) exec "$@" ;;
    *) exec roundhouse "$@" ;;
esac
