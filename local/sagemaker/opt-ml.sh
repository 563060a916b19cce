# Gives a command its own /opt/ml; run within a private mount namespace (unshare -m), so nobody else sees it.
#
#   unshare -m sh opt-ml.sh <job folder> <empty folder> <command> [argument ...]
#
# Where the machine has no /opt/ml, /opt becomes a memory file system on which everything of the machine's /opt is
# mounted again (the interpreter may live there), with the machine's own /opt put aside on the empty folder.
set -eu
job=$1
aside=$2
shift 2
if [ ! -d /opt/ml ]; then
  mkdir -p "$aside"
  if [ -d /opt ]; then
    mount --rbind /opt "$aside"
    case $job in /opt/*) job=$aside/${job#/opt/} ;; esac
  fi
  mount -t tmpfs -o mode=755 opt /opt
  for entry in "$aside"/* "$aside"/.[!.]*; do
    name=/opt/${entry##*/}
    if [ -L "$entry" ]; then
      cp -P "$entry" "$name"
    elif [ -d "$entry" ]; then
      mkdir "$name"
      mount --rbind "$entry" "$name"
    elif [ -e "$entry" ]; then
      : >"$name"
      mount --bind "$entry" "$name"
    fi
  done
  mkdir /opt/ml
fi
mount --rbind "$job" /opt/ml
exec "$@"
