#!/usr/bin/env bash
# One of these on each host, with the same arguments: HOSTS=4 FIRST=gpu01 bash torchrun_many_hosts.sh experiment=sd_base ...
set -euo pipefail
: "${HOSTS:?how many hosts}" "${FIRST:?name or address of the first host}"
ulimit -n "$(ulimit -Hn)"
exec torchrun --nnodes="$HOSTS" --nproc_per_node="${PROCESSES:-gpu}" --rdzv_backend=c10d \
    --rdzv_endpoint="$FIRST:${PORT:-29500}" --rdzv_id="${JOB:-ldm}" -m ldm.run trainer=ddp "$@"
