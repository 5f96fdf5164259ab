"""Generate Python from ``protos/`` into ``gen/``, and one descriptor image for ``buf lint`` and ``buf breaking``.

``buf/validate/validate.proto`` is not vendored: the descriptor that the ``protovalidate`` package carries is handed to
protoc, so rules and engine can never be of two versions. ``google/*`` comes with ``googleapis-common-protos``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
VALIDATE = "buf/validate/validate.proto"


def validate_descriptors() -> bytes:
    """Serialized FileDescriptorSet of validate.proto and what it imports."""
    from protovalidate._gen.buf.validate import validate_pb

    files = descriptor_pb2.FileDescriptorSet()
    for name in ("descriptor", "duration", "field_mask", "timestamp"):
        module = importlib.import_module(f"google.protobuf.{name}_pb2")
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.append(descriptor_pb2.FileDescriptorProto.FromString(validate_pb.desc().proto.to_binary()))
    return files.SerializeToString()


def main() -> int:
    """Write ``gen/`` anew; the old one stays untouched when protoc fails."""
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    site = sysconfig.get_path("purelib")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".gen-") as scratch:
        out = Path(scratch) / "gen"
        out.mkdir()
        descriptors = Path(scratch) / "validate.binpb"
        descriptors.write_bytes(validate_descriptors())
        environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        common = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--descriptor_set_in={descriptors}",
            "-Iprotos",
            f"-I{site}",
        ]
        targets = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
        targets += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
        image = [f"--descriptor_set_out={out}/image.binpb", "--include_imports", "--include_source_info"]
        for arguments in ([*targets, *protos, VALIDATE], [*image, *protos]):
            done = subprocess.run([*common, *arguments], cwd=ROOT, env=environment, check=False)
            if done.returncode:
                return done.returncode
        (out / ".generated").touch()
        target = ROOT / "gen"
        shutil.rmtree(target, ignore_errors=True)
        out.rename(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
