#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine: `ray.sh start PORT`, later `ray.sh stop`. RAY names the command.
set -euo pipefail
ray=${RAY:-ray}
if [ "$1" = stop ]; then
  exec "$ray" stop --force
fi
small=(--num-cpus=1 --object-store-memory=100000000 --disable-usage-stats)
"$ray" start --head --node-ip-address=127.0.0.1 --port="$2" --include-dashboard=false "${small[@]}"
"$ray" start --address="127.0.0.1:$2" --node-ip-address=127.0.0.1 "${small[@]}"
