#!/usr/bin/env bash
# Builds kube-apiserver 1.20.2 from Debian's source package into the folder OUT (about 5 minutes on
# two cores, 3 GB), for `make kube-test`. Debian (bookworm) only. Its sources contain all modules, so
# nothing else is downloaded. Later versions need a newer Go and their modules.
#   tools/kube/build_api_server.sh OUT
set -euo pipefail

mkdir -p "$1"
OUT=$(cd "$1" && pwd)
WORK=$OUT/src
KUBERNETES=$WORK/go/src/k8s.io/kubernetes
GO=/usr/lib/go-1.19/bin

if [ ! -x $GO/go ] || ! command -v etcd >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends golang-1.19-go etcd-server
fi

# A private list of sources: the machine's may have no deb-src lines.
mkdir -p "$WORK"/apt/lists/partial "$WORK"/apt/cache/archives/partial "$KUBERNETES"
mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/*.sources)
for kind in deb deb-src; do
  echo "$kind [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main"
done > "$WORK/apt/sources.list"
apt_options=(
  -o Dir::Etc::sourcelist="$WORK/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o Dir::State::lists="$WORK/apt/lists" -o Dir::Cache="$WORK/apt/cache" -o APT::Sandbox::User=root
)
cd "$WORK"
if [ ! -e "$KUBERNETES/cmd" ]; then
  apt-get "${apt_options[@]}" update -qq
  apt-get "${apt_options[@]}" source -qq --download-only kubernetes
  tar -xzf kubernetes_*.orig.tar.gz -C "$KUBERNETES" --strip-components=1
fi
# The vendored reflect2 reads maps as Go did before 1.18, and custom resources crash the server.
if [ ! -e reflect2 ]; then
  apt-get "${apt_options[@]}" update -qq
  apt-get "${apt_options[@]}" download -qq golang-github-modern-go-reflect2-dev
  dpkg-deb -x golang-github-modern-go-reflect2-dev_*.deb reflect2
  vendored=$KUBERNETES/vendor/github.com/modern-go/reflect2
  rm -rf "$vendored"
  cp -rL reflect2/usr/share/gocode/src/github.com/modern-go/reflect2 "$vendored"
fi

cd "$KUBERNETES"
export PATH=$GO:$PATH GOPATH=$WORK/go GOPROXY=off GOCACHE=$WORK/cache GO111MODULE=off CGO_ENABLED=0
if [ ! -e pkg/generated/openapi/zz_generated.openapi.go ]; then
  go build -o "$WORK/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
  packages=$(grep -rlE '\+k8s:openapi-gen=' --include=*.go staging/src/k8s.io pkg cmd \
    | xargs -n1 dirname | sort -u | grep -vE 'sample|code-generator|_examples|/test' \
    | sed -E 's#^staging/src/#k8s.io/kubernetes/vendor/#; t; s#^#k8s.io/kubernetes/#' | paste -sd,)
  "$WORK/openapi-gen" -h hack/boilerplate/boilerplate.generatego.txt -i "$packages" \
    -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi -r "$WORK/openapi.txt"
fi
flags="-s -w"
for package in component-base/version client-go/pkg/version; do
  version=k8s.io/kubernetes/vendor/k8s.io/$package
  flags+=" -X $version.gitVersion=v1.20.2 -X $version.gitMajor=1 -X $version.gitMinor=20"
done
go build -ldflags "$flags" -o "$OUT/kube-apiserver" ./cmd/kube-apiserver
