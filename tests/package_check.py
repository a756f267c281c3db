"""Checks what `make package` built: the archives' contents, and the wheel once it is installed in an empty environment.

    python tests/package_check.py archives DIST   the source distribution and the wheel in DIST, against this checkout
    python -I tests/package_check.py installed    the installation of this Python: contents, native module, doctor, decoding

A script and not a test: it runs without pytest, in an environment that holds HedgeSpec and its declared dependencies only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent


def check(condition: object, message: str) -> None:
    """Ends the program with the message unless the condition holds."""
    if not condition:
        sys.exit(f"package_check: {message}")


def sources(*patterns: str) -> set[str]:
    """Files of the checkout that match, as paths relative to it."""
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    check(found, f"{patterns} match nothing in {ROOT}")
    return {name for name in found if "__pycache__" not in name}


def archives(folder: Path) -> None:
    """Checks that both archives hold every source and data file they should, and nothing of the repository alone."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    code = sources("hedgespec/**/*.py") | sources("hedgespec/py.typed")
    data = sources("hedgespec/zoo/**/*.safetensors", "hedgespec/zoo/*.jsonl", "hedgespec/zoo/LICENSE*")
    kernels = sources("triton_kernels/*.py")

    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive if member.isfile()}
    building = sources("csrc/*", "CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in")
    about = sources("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "docs/*.md")
    missing = (code | data | kernels | building | about) - names
    check(not missing, f"{sdist.name} lacks {sorted(missing)}")
    surplus = {name for name in names if name.startswith(("bench/", "tests/", ".", "experiments/")) or name.endswith(".so")}
    check(not surplus, f"{sdist.name} holds {sorted(surplus)}")

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tags = [line for line in archive.read(dist_info(names, "WHEEL")).decode().splitlines() if line.startswith("Tag: ")]
    installed_kernels = {f"hedgespec/{name}" for name in kernels}
    module = f"hedgespec/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    missing = (code | data | installed_kernels | {module}) - names
    check(not missing, f"{wheel.name} lacks {sorted(missing)}")
    surplus = {name for name in names if not name.startswith(("hedgespec/", "hedgespec-"))}
    check(not surplus, f"{wheel.name} holds {sorted(surplus)}")
    for licence in ("licenses/LICENSE", "licenses/hedgespec/zoo/LICENSE-PSF-2.0.txt"):
        check(dist_info(names, licence), f"{wheel.name} lacks {licence}")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    check(tags == [f"Tag: {version}-{version}-{platform}"], f"{wheel.name} has the tags {tags}")
    print(f"package_check: {sdist.name} and {wheel.name} are complete")


def dist_info(names: set[str], file: str) -> str:
    """The wheel's metadata file of this name, or an empty string."""
    return next((name for name in names if name.endswith(f".dist-info/{file}")), "")


def installed() -> None:
    """Checks the installation that this Python imports."""
    import hedgespec

    folder = Path(hedgespec.__file__).parent
    check(ROOT not in folder.parents or "site-packages" in folder.parts, f"hedgespec comes from the checkout: {folder}")
    check(hedgespec.__version__ == importlib.metadata.version("hedgespec"), "the versions of package and metadata differ")
    check((folder / "py.typed").exists(), "py.typed is missing")

    doctor = [str(Path(sysconfig.get_path("scripts"), "hedgespec")), "doctor"]
    print(subprocess.run(doctor, check=True, capture_output=True, text=True).stdout)
    report = json.loads(subprocess.run([*doctor, "--json"], check=True, capture_output=True, text=True).stdout)
    check(report["native"]["built"], f"no native module: {report['native']}")
    for operation in ("evaluate", "verify", "linear"):
        check(report["operations"][operation]["cpu"] == "available", f"{operation} has no cpu backend: {report['operations']}")
    check(importlib.util.find_spec("hedgespec.triton_kernels.evaluate"), "the Triton kernels are missing")

    decode_with_a_tiny_target()
    if importlib.util.find_spec("gguf"):  # the extra zoo is installed
        decode_with_the_zoo()


def decode_with_a_tiny_target() -> None:
    """Decodes with prompt lookup and a small model as drafters of a random target; the text has to be the target's own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hedgespec import DecodeConfig, Decoder
    from hedgespec.drafters.causal_lm import CausalLMDrafter
    from hedgespec.drafters.ngram import NGramDrafter

    def model(layers: int) -> LlamaForCausalLM:
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    target, prompt = model(2), torch.arange(1, 10)[None]
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False)
    drafters = [NGramDrafter(61), CausalLMDrafter(model(1), target)]
    out = Decoder(target, drafters, DecodeConfig(draft_length=3)).generate(prompt, max_new_tokens=24, temperature=0.0)
    check(torch.equal(torch.as_tensor(out.sequences[0]), expected[0]), "another text than the target's own")
    print("package_check: decoded 24 tokens with a tiny target")


def decode_with_the_zoo() -> None:
    """Decodes a few tokens with the zoo's target, which is fetched if it is not in the cache, and the heads of the wheel."""
    import hedgespec

    zoo = hedgespec.load_zoo()
    prompt = zoo.tokenizer("CREATE TABLE customers (", return_tensors="pt").input_ids
    out = hedgespec.Decoder(zoo.target, zoo.drafters).generate(prompt, max_new_tokens=16, temperature=0.0)
    [stats] = out.stats
    check(len(out.sequences[0]) > prompt.shape[1] and stats.picks.sum() > 0, "the zoo decoded nothing")
    print(f"package_check: decoded with the zoo: {zoo.tokenizer.decode(out.sequences[0])!r}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["archives", folder]:
            archives(Path(folder))
        case ["installed"]:
            installed()
        case _:
            sys.exit(__doc__)
