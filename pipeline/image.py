"""The project's image: ``python -m pipeline.image`` builds it, unless one of the same content exists.

Its tag is a hash of its content: the files that docker/Dockerfile.dockerignore admits, torch's build, the base.
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
from pipeline.command import application
from pipeline.containers import connect, has_image, reason
from pipeline.profile import DEFAULTS, Cluster, Profile, find_profile

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
PLACE = re.compile(r"[A-Za-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*")
"""of images: a registry's host, and a path there"""
KEPT = re.compile("immutab|overwrit")
"""in what a registry says that lets no tag be changed, of one that it has; also where it is of the same image"""


@dataclass(frozen=True)
class Content:
    """The content of an image."""

    files: Mapping[str, Path]
    """by name in the build's context"""
    arguments: Mapping[str, str]
    """build arguments that decide the content, not those that say where to fetch it"""
    platform: str = ""
    """linux/amd64, or another; empty for the daemon's own"""

    def tag(self) -> str:
        """``dvq:0.1.0-`` and a hash of the content."""
        digest = hashlib.sha256(self.platform.encode() + repr(sorted(self.arguments.items())).encode())
        for name, path in sorted(self.files.items()):
            content = path.read_bytes()
            digest.update(f"{name} {os.access(path, os.X_OK)} {len(content)}\n".encode() + content)
        return f"{IMAGE}-{digest.hexdigest()[:12]}"

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
    """The content of an image.

    Args:
        torch: torch's build ("2.13.0+cpu"); by default this environment's, so that both compute the same bits.
        base: the base image; by default the Dockerfile's.
        platform: as in Content.
    """
    ignore_file = ROOT / f"{DOCKERFILE}.dockerignore"
    if not ignore_file.exists():
        raise DvqError(
            f"there is no {ignore_file}: the image is made from a clone of the project, not from its package"
        )
    allowed = ignore_file.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in allowed if line and not line.startswith("#")]
    names = exclude_paths(str(ROOT), patterns, dockerfile=DOCKERFILE)
    files = {name: ROOT / name for name in names if (ROOT / name).is_file()}
    arguments = {"TORCH": torch or metadata.version("torch"), **({"BASE_IMAGE": base} if base else {})}
    return Content(files, arguments, platform)


def of(profile: Profile) -> Content:
    """The content of this checkout's image for a profile; TORCH and BASE in the environment take precedence."""
    cluster = profile.cluster or Cluster()
    return content(os.environ.get("TORCH") or cluster.torch, os.environ.get("BASE", ""), cluster.platform)


def name(profile: Profile, pushed: bool) -> str:
    """The image of a profile's tasks: its own, or this checkout's, in its registry if ``pushed``."""
    place = registry(profile) if pushed else ""
    return profile.image or "/".join(filter(None, (place, of(profile).tag())))


def registry(profile: Profile) -> str:
    """The registry of a profile's image; empty for none."""
    place = (os.environ.get("REGISTRY") or (profile.cluster or Cluster()).registry).rstrip("/")
    if place and not PLACE.fullmatch(place):  # else it would be the nodes that find no image of that name
        raise DvqError(
            f"REGISTRY = '{place}': give host/path, without https:// and the path in small letters"
        )
    return place


def pip_settings() -> dict[str, list[str]]:
    """index-url, extra-index-url and find-links, as pip is configured on this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    matches = sorted(SETTING.findall(listing), key=lambda setting: SECTIONS.index(setting[0]))
    return {name: value.replace("\\n", " ").split() for _, name, value in matches}


def wheels(torch: str, settings: Mapping[str, list[str]]) -> dict[str, Path]:
    """Torch's wheels in the folders of pip's settings, which a build cannot read: they become part of its context."""
    folders = [Path(place.removeprefix("file://")) for place in settings.get("find-links", [])]
    paths = [path for folder in folders for path in folder.glob(f"torch-{torch}-*linux*.whl")]
    return {f"wheels/{path.name}": path for path in paths}


def index_arguments(settings: Mapping[str, list[str]]) -> dict[str, str]:
    """Build arguments for the addresses in ``settings``, without folders of this machine."""
    remote = {
        name: [address for address in places if address.startswith("http")]
        for name, places in settings.items()
    }
    index, extra, links = (
        " ".join(remote.get(option, [])) for option in ("index-url", "extra-index-url", "find-links")
    )
    arguments = {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index, "UV_INDEX": extra, "UV_FIND_LINKS": links}
    return {name: value for name, value in arguments.items() if value}


def build(client: docker.DockerClient, made_of: Content) -> None:
    """Build and tag the image, and print the build's log; DvqError names the step that failed."""
    settings = pip_settings()
    torch = made_of.arguments["TORCH"]
    wheel_files, index = wheels(torch, settings), index_arguments(settings)
    if not wheel_files and not index and "+" in torch:  # no other index than PyPI, which has no such builds
        index = {"UV_TORCH_BACKEND": torch.partition("+")[2]}
    whole = replace(made_of, files={**made_of.files, **wheel_files})
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
    """Print the messages of a build or a push; DvqError with the failed step and the reason if one is an error."""
    complaint = ""
    for message in messages:
        raw = message.get("stream", "")
        text = COLOUR.sub("", raw)
        if text.startswith("Step "):
            step, complaint = text.strip(), ""
        if raw != text:  # the daemon colours a command's standard error
            complaint += text
        if "status" in message and "progressDetail" not in message:
            text = f"{message['status']}\n"
        print(text, end="", flush=True)
        if "error" in message:
            raise DvqError(f"the image: {step} failed: {_failure(message['error'].strip(), complaint)}")


def _failure(error: str, complaint: str) -> str:
    """The daemon's reason with its remedy; for a failed command, its standard error from the last "error" on."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    if "returned a non-zero code" in error and lines:
        starts = [at for at, line in enumerate(lines) if line.lower().startswith("error")]
        return " ".join(lines[starts[-1] if starts else -1 :])
    for sign, remedy in REMEDIES.items():
        if sign in error:
            return f"{error}; {remedy}"
    return error


def push(client: docker.DockerClient, tag: str, place: str) -> str:
    """Push the image to the registry ``place`` under its tag, and under the release's, which the manifests in k8s/
    name; returns the former name. A tag that the registry has and lets nobody change stays what it is."""
    for name in (f"{place}/{IMAGE}", f"{place}/{tag}"):
        try:
            client.images.get(tag).tag(name)
        except docker.errors.APIError as error:
            raise DvqError(f"REGISTRY = '{place}': {reason(error)}; give host/path") from None
        try:
            follow(client.images.push(name, stream=True, decode=True), f"the push of {name}")
        except DvqError as error:
            if not KEPT.search(str(error)):
                raise
            print(f"{name} is there already, and the registry keeps it as it is")
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
    # To push, as submit-sweep ON=kfp looks for it.
    profile_name = profile or (DEFAULTS["kfp"] if pushed else "")
    target = find_profile(profile_name) if profile_name else Profile()
    place = registry(target)
    if pushed and not place:
        raise DvqError("PUSH=1: name a registry, REGISTRY=host/path, or cluster.registry in the profile")
    client, made_of = connect(), of(target)
    tag = made_of.tag()
    try:
        if not has_image(client, tag):
            build(client, made_of)
        client.images.get(tag).tag(IMAGE)  # what the compiled components name
        print(push(client, tag, place) if pushed else tag)
    except DockerException as error:
        raise DvqError(f"the image {tag}: {reason(error)}") from None


app = application(image)

if __name__ == "__main__":
    app()
