#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine: `ray.sh start FOLDER PORT`, later `ray.sh stop FOLDER`. RAY names the
# command. Each node is held by a process of ours, which ends what it started, and nothing else, when it is told to.
set -euo pipefail
ray=${RAY:-ray}
folder=$2
if [ "$1" = stop ]; then
  mapfile -t nodes < "$folder/nodes.pid"
  kill "${nodes[@]}" 2> /dev/null || true
  for _ in $(seq 60); do
    kill -0 "${nodes[@]}" 2> /dev/null || exit 0
    sleep 0.5
  done
  exit 1
fi
small=(--num-cpus=1 --object-store-memory=100000000 --disable-usage-stats --block)
mkdir -p "$folder"
node() {
  setsid "$ray" start "$@" "${small[@]}" > "$folder/$1.log" 2>&1 < /dev/null &
  echo $! >> "$folder/nodes.pid"
}
alive() {
  "$ray" status --address="127.0.0.1:$1" 2> /dev/null | grep -c '^ 1 node_'
}
node --head --node-ip-address=127.0.0.1 --port="$3" --include-dashboard=false
for nodes in 1 2; do
  for _ in $(seq 120); do
    [ "$(alive "$3")" -ge "$nodes" ] && break
    sleep 0.5
  done
  [ "$nodes" = 1 ] && node --address="127.0.0.1:$3" --node-ip-address=127.0.0.1
done
[ "$(alive "$3")" -eq 2 ]
