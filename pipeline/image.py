"""The project's image: ``python -m pipeline.image`` builds it, unless one of the same content was built before.

Its tag is a hash of its content: the files that docker/Dockerfile.dockerignore lets in, torch's build, the base.
"""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated, Any

import docker
import typer
from docker.errors import DockerException
from docker.utils.build import exclude_paths

from components import IMAGE
from dvq import DvqError, __version__
from dvq.provenance import commit
from pipeline import preflight
from pipeline.containers import connect, has, reason
from pipeline.profile import Cluster, Profile, find_profile

ROOT = Path(__file__).parent.parent
DOCKERFILE = "docker/Dockerfile"
SETTING = re.compile(r"^(global|install|:env:)\.(index-url|extra-index-url|find-links)='(.*)'$", re.MULTILINE)
SECTIONS = ("global", "install", ":env:")
"""of pip's settings; later ones override earlier ones"""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
REMEDIES = {
    "no space left": "make room: docker system prune",
    "unauthorized": "docker login",
    "denied": "docker login",
    "no basic auth": "docker login",
    "registry-1.docker.io": "where no registry is reached, make base makes the base image",
}


@dataclass(frozen=True)
class Content:
    """What an image is made of."""

    files: Mapping[str, Path]
    """by their names in the build's context"""
    arguments: Mapping[str, str]
    """build arguments that decide the content, as opposed to where it is fetched from"""
    platform: str = ""
    """linux/amd64, or another; empty for the daemon's own"""

    def tag(self) -> str:
        """``dvq:0.1.0-`` and a hash of the content."""
        found = hashlib.sha256(self.platform.encode() + repr(sorted(self.arguments.items())).encode())
        for name, path in sorted(self.files.items()):
            content = path.read_bytes()
            found.update(f"{name} {os.access(path, os.X_OK)} {len(content)}\n".encode() + content)
        return f"{IMAGE}-{found.hexdigest()[:12]}"

    def write(self, file: IO[bytes]) -> None:
        """The build's context, as a tar archive."""
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, path in sorted(self.files.items()):
                tar.add(path, name, filter=_anonymous)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def content(torch: str = "", base: str = "", platform: str = "") -> Content:
    """The content of an image with torch's build ``torch`` ("2.13.0+cpu"), by default this environment's, so that
    both compute the same bits; on the image ``base``, by default the Dockerfile's; for ``platform``."""
    listed = ROOT / f"{DOCKERFILE}.dockerignore"
    if not listed.exists():
        raise DvqError(
            f"there is no {listed}: the image is made from a clone of the project, not from its package"
        )
    allowed = listed.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in allowed if line and not line.startswith("#")]
    names = exclude_paths(str(ROOT), patterns, dockerfile=DOCKERFILE)
    files = {name: ROOT / name for name in names if (ROOT / name).is_file()}
    arguments = {"TORCH": torch or metadata.version("torch"), **({"BASE_IMAGE": base} if base else {})}
    return Content(files, arguments, platform)


def of(profile: Profile) -> Content:
    """The content of this checkout's image for a profile; TORCH and BASE in the environment win."""
    cluster = profile.cluster or Cluster()
    return content(os.environ.get("TORCH") or cluster.torch, os.environ.get("BASE", ""), cluster.platform)


def name(profile: Profile, pushed: bool) -> str:
    """The image that a profile's tasks run: its own, or this checkout's, ``pushed`` to its registry or not."""
    place = registry(profile) if pushed else ""
    return profile.image or "/".join(filter(None, (place, of(profile).tag())))


def registry(profile: Profile) -> str:
    """Where a profile's image is pushed to; empty for nowhere."""
    return (os.environ.get("REGISTRY") or (profile.cluster or Cluster()).registry).rstrip("/")


def pip_settings() -> dict[str, list[str]]:
    """index-url, extra-index-url and find-links, as pip is configured on this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = sorted(SETTING.findall(listing), key=lambda one: SECTIONS.index(one[0]))
    return {name: value.replace("\\n", " ").split() for _, name, value in found}


def wheels(torch: str, settings: Mapping[str, list[str]]) -> dict[str, Path]:
    """Torch's wheels in the folders that pip looks in: a build cannot look there, so they become part of its
    context."""
    folders = [Path(place.removeprefix("file://")) for place in settings.get("find-links", [])]
    found = [path for folder in folders for path in folder.glob(f"torch-{torch}-*linux*.whl")]
    return {f"wheels/{path.name}": path for path in found}


def index_arguments(settings: Mapping[str, list[str]]) -> dict[str, str]:
    """Build arguments for the addresses in ``settings``; folders of this machine are left out."""
    remote = {name: [at for at in places if at.startswith("http")] for name, places in settings.items()}
    index, extra, links = (
        " ".join(remote.get(n, [])) for n in ("index-url", "extra-index-url", "find-links")
    )
    told = {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index, "UV_INDEX": extra, "UV_FIND_LINKS": links}
    return {name: value for name, value in told.items() if value}


def build(client: docker.DockerClient, made_of: Content) -> None:
    """Build the image and tag it, its log on standard output; DvqError names the step that failed."""
    settings = pip_settings()
    torch = made_of.arguments["TORCH"]
    given, index = wheels(torch, settings), index_arguments(settings)
    if not given and not index and "+" in torch:  # no other index than PyPI, which has no such builds
        index = {"UV_TORCH_BACKEND": torch.partition("+")[2]}
    whole = replace(made_of, files={**made_of.files, **given})
    arguments = {**whole.arguments, **index, "VERSION": __version__, "REVISION": commit()}
    with tempfile.TemporaryFile() as context:
        whole.write(context)
        context.seek(0)
        messages = client.api.build(
            fileobj=context, custom_context=True, dockerfile=DOCKERFILE, tag=made_of.tag(),
            buildargs=arguments, rm=True, forcerm=True, decode=True, platform=made_of.platform or None,
        )  # fmt: skip
        follow(messages)


def follow(messages: Iterable[Mapping[str, Any]], step: str = "the daemon") -> None:
    """Print a build's or a push's messages; DvqError if one of them is an error, with the failed step and why."""
    complaint = ""
    for message in messages:
        raw = message.get("stream", "")
        text = COLOUR.sub("", raw)
        if text.startswith("Step "):
            step, complaint = text.strip(), ""
        if raw != text:  # the daemon colours what a command says on its standard error
            complaint += text
        if "status" in message and "progressDetail" not in message:
            text = f"{message['status']}\n"
        print(text, end="", flush=True)
        if "error" in message:
            raise DvqError(f"the image: {step} failed: {_why(message['error'].strip(), complaint)}")


def _why(error: str, complaint: str) -> str:
    """The daemon's reason with its remedy; of a command that failed, its complaint from the last "error" on."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    if "returned a non-zero code" in error and lines:
        starts = [at for at, line in enumerate(lines) if line.lower().startswith("error")]
        return " ".join(lines[starts[-1] if starts else -1 :])
    for sign, remedy in REMEDIES.items():
        if sign in error:
            return f"{error}; {remedy}"
    return error


def push(client: docker.DockerClient, tag: str, place: str) -> str:
    """Push the image to the registry ``place``, also under the release's name, which the manifests in k8s/ can know
    before there is an image; returns its own name there."""
    for name in (f"{place}/{IMAGE}", f"{place}/{tag}"):
        try:
            client.images.get(tag).tag(name)
        except docker.errors.APIError as error:
            raise DvqError(f"REGISTRY = '{place}': {reason(error)}; give host/path") from None
        follow(client.images.push(name, stream=True, decode=True), f"the push of {name}")
    return name


def image(
    profile: Annotated[
        str, typer.Option(help="of whose cluster: a name in pipeline/profiles, or a file; to push, nvidia")
    ] = "",
    pushed: Annotated[
        bool, typer.Option("--push", help="push it to REGISTRY, or the profile's registry")
    ] = False,
) -> None:
    """Build the image, unless it is there; push it if that is asked."""
    named = profile or (preflight.PROFILE["kfp"] if pushed else "")  # as submit-sweep ON=kfp looks for it
    limits = find_profile(named) if named else Profile()
    place = registry(limits)
    if pushed and not place:
        raise DvqError("PUSH=1: name a registry, REGISTRY=host/path, or cluster.registry in the profile")
    client, made_of = connect(), of(limits)
    tag = made_of.tag()
    try:
        if not has(client, tag):
            build(client, made_of)
        client.images.get(tag).tag(IMAGE)  # what the compiled components name
        print(push(client, tag, place) if pushed else tag)
    except DockerException as error:
        raise DvqError(f"the image {tag}: {reason(error)}") from None


app = preflight.application(image)

if __name__ == "__main__":
    app()
