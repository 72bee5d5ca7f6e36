#!/usr/bin/env bash
# The images that the stages of bench/gpu/run.sh read, packed to travel in two loads of at most 64 MiB.
#
#     bench/gpu/pack.sh DATA        DATA holds the shards imagenet-sample/*.tar and cifar10/{train,test}-*.tar
#
# Makes .gpu/data/: check.tar (two dozen JPEGs, 3 MB, beside the packages of .gpu/), and for a second load speed.tar (the
# ImageNet sample as it is) and quality.tar.xz (CIFAR-10; 19 MB, as the headers of its JPEGs are all alike).
set -euo pipefail
data=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p .gpu/data
grep -qxF /.gpu/ .git/info/exclude 2>/dev/null || echo /.gpu/ >>.git/info/exclude
few=$(mktemp -d)
trap 'rm -rf "$few"' EXIT
tar -xf "$data/imagenet-sample/00.tar" -C "$few" --wildcards '*.jpg'
(cd "$few" && find . -name '*.jpg' -printf '%P\n' | sort | head -n 24 >list && tar -cf few.tar -T list)
mv "$few/few.tar" .gpu/data/check.tar
tar -C "$data/imagenet-sample" -cf .gpu/data/speed.tar .
tar -C "$data/cifar10" -c . | xz -T0 -6 >.gpu/data/quality.tar.xz
du -h .gpu/data/*
