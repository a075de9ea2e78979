#!/usr/bin/env bash
# Makes a folder with a 64-bit Arm Python and LiteRT for it, which benchmarks/arm.py runs under qemu-aarch64:
#     bash benchmarks/arm.sh FOLDER
# On Debian 12, as root, with the packages qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross.
set -euo pipefail
folder=${1:?name a new folder}
mkdir -p "$folder/debs"
cd "$folder"
known=$(dpkg --print-foreign-architectures)
dpkg --add-architecture arm64
trap '[[ $known == *arm64* ]] || dpkg --remove-architecture arm64' EXIT
apt-get update -qq
packages=(python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 zlib1g libexpat1 libffi8 libssl3
  libbz2-1.0 liblzma5 libstdc++6 libgcc-s1 libuuid1)
(cd debs && apt-get download -qq "${packages[@]/%/:arm64}")
for package in debs/*.deb; do dpkg -x "$package" root; done
for version in numpy==2.4.6 ai-edge-litert==2.3.0; do
  python3 -m pip install --quiet --disable-pip-version-check --target site --no-deps --only-binary=:all: \
    --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 "$version"
done
python3 -m pip install --quiet --disable-pip-version-check --target site --no-deps --only-binary=:all: \
  --python-version 3.11 flatbuffers==25.12.19 packaging
# LiteRT reads here what processor it has; without the file it would read that of the real one, and end.
mkdir -p root/proc
printf '%s\n' $'processor\t: 0' $'BogoMIPS\t: 108.00' $'Features\t: fp asimd evtstrm crc32 cpuid' \
  $'CPU implementer\t: 0x41' 'CPU architecture: 8' $'CPU variant\t: 0x0' $'CPU part\t: 0xd08' $'CPU revision\t: 3' '' \
  > root/proc/cpuinfo
printf '%s\n' "$folder: ready"
