"""The library of the attention kernel: from a wheel, built here, or not to be had; no process dies of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Full, LayerSpec, NotSupportedError, Window, attend
from jaxkv.cli import doctor, main
from jaxkv.native import build, library, sealed

ROOT = Path(__file__).parent.parent
N, K, H, HV, ROWS = 6, 2, 24, 20, 3


@pytest.fixture(autouse=True)
def _kernel():
    if library.problem():
        pytest.skip(library.problem())
    yield
    library.problem.cache_clear()


@pytest.fixture(scope="module")
def bytes_of_library():
    try:
        return build.built().read_bytes()
    except build.Unusable as error:
        pytest.skip(str(error))


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A cache directory with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxkv" / "native"


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small():
    cache = Cache.init([LayerSpec(Window(5), K, H, HV)], ROWS, 64)
    cache, step = cache.begin(jnp.tile(jnp.arange(8), (ROWS, 1)))
    layer = cache.layers[0].put(step, normal(1, ROWS, 8, K, H), normal(2, ROWS, 8, K, HV))
    return normal(3, ROWS, 8, N, H), layer, step


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# Built at first use.


def test_a_damaged_library_is_built_anew_and_never_loaded(empty, monkeypatch, bytes_of_library):
    original, builds = bytes_of_library, []

    def compile_it(compiler, to):
        builds.append(compiler)
        to.write_bytes(original)

    monkeypatch.setattr(build, "_compile", compile_it)
    path = build.where()
    path.parent.mkdir(parents=True)
    for damaged in (flipped(original, len(original) // 2), flipped(original, -1), original[:-1], b""):
        path.write_bytes(damaged)
        assert build.built() == path
    assert build.built() == path
    assert len(builds) == 4
    assert {x.suffix for x in path.parent.iterdir()} == {".so", ".lock"}
    library.load(path)


PRINT_BUILT = "from jaxkv.native import build; print(build.built())"


def test_of_two_processes_at_once_one_builds_and_the_other_waits_for_it(empty, tmp_path, monkeypatch, bytes_of_library):
    (tmp_path / "made.so").write_bytes(bytes_of_library)
    made, log = tmp_path / "made.so", tmp_path / "log"
    compiler = script(tmp_path / "slow", f'echo run >> {log}; sleep 2; for to; do :; done; cp {made} "$to"')
    environment = {**os.environ, "CXX": compiler, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRINT_BUILT]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    monkeypatch.setenv("CXX", compiler)
    assert said == {str(build.where())}
    assert log.read_text() == "run\n"
    sealed.check(build.where())


def test_a_compiler_that_hangs_is_ended_with_what_it_started_and_not_tried_again_by_the_next_process(
    empty, tmp_path, monkeypatch
):
    child = tmp_path / "child"
    monkeypatch.setenv("CXX", script(tmp_path / "hangs", f"sleep 1000 & echo $! > {child}; echo x >> {child}s; wait"))
    monkeypatch.setattr(build, "_PATIENCE", 1)
    for reason in ("hangs failed: it had not ended after 1 s$", "after 1 s; delete .*failed to try again"):
        with pytest.raises(build.Unusable, match=reason):
            build.built()
    stat = Path("/proc", child.read_text().strip(), "stat")
    until = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    assert len((tmp_path / "childs").read_text()) == 2
    build.where().with_suffix(".failed").unlink()
    with pytest.raises(build.Unusable, match=r"after 1 s$"):
        build.built()


def test_a_user_without_a_home_has_no_library_and_learns_how_to_get_one(monkeypatch):
    import pwd

    def nobody(user):
        raise KeyError(user)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    library.problem.cache_clear()
    monkeypatch.setattr(library, "_LIBRARIES", [])
    assert "set XDG_CACHE_HOME" in library.problem()


# From a wheel.


@pytest.mark.slow
def test_the_wheel_brings_a_library_that_a_fresh_process_uses_without_a_compiler(tmp_path):
    pytest.importorskip("scikit_build_core")
    if not shutil.which("cmake"):
        pytest.skip("there is no cmake")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    sets = build._target()[0].rpartition("=")[2]  # one, for time; the wheels that are given away have all
    subprocess.run([*pip, tmp_path, ROOT / "native", "-C", f"cmake.define.JAXKV_SETS={sets}"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"jaxkv_cpu-{re.escape(jaxkv.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": "",
        "CXX": "",
    }
    done = subprocess.run([sys.executable, "-m", "jaxkv", "doctor"], env=environment, capture_output=True, text=True)
    assert re.search(rf"native +a library with [\w-]+ instructions, from jaxkv-cpu {jaxkv.__version__}, ", done.stdout)
    assert not (tmp_path / "cache").exists()


def test_a_wheel_that_is_damaged_or_of_other_sources_gives_way_to_what_is_built_here(
    tmp_path, monkeypatch, caplog, capsys, bytes_of_library
):
    original, path = bytes_of_library, tmp_path / "kernels.so"
    monkeypatch.setattr(library, "in_wheel", lambda: path)
    body = original[: -2 * 64]
    cases = {
        flipped(original, len(original) // 2): "is damaged",
        original[:1000]: "is damaged",
        body + b"0" * 64 + original[-64:]: "of other sources",
        original[:18] + b"\x03" + original[19:]: "not a library for",
        b"": "not a library for",
        None: "can't be read",
    }
    for content, reason in cases.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        for found in (library.problem, library._wheel):
            found.cache_clear()
        monkeypatch.setattr(library, "_LIBRARIES", [])
        monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)  # it is there already
        caplog.clear()
        with caplog.at_level("INFO", "jaxkv"):
            assert library.problem() is None
        assert len(caplog.records) == 1
        assert re.search(f"jaxkv-cpu is left alone: .*{reason}", caplog.text)
        assert library.origin().startswith("built here, ")
    assert main(["doctor"]) == 0
    assert "; the library of jaxkv-cpu is left alone: " in capsys.readouterr().out
    library._wheel.cache_clear()


# Neither.


def test_a_library_for_another_machine_another_jaxlib_or_with_wrong_sums_is_not_given_to_xla(
    tmp_path, monkeypatch, bytes_of_library
):
    other = tmp_path / "other.so"
    for damaged in (bytes_of_library[:18] + b"\x03" + bytes_of_library[19:], b"#!/bin/sh\n", b""):
        other.write_bytes(damaged)
        with pytest.raises(library.Unusable, match="not a library for"):
            library.load(other)
    with monkeypatch.context() as patch:
        patch.setattr(library, "_api_version", lambda: 2)
        with pytest.raises(library.Unusable, match=r"for another jaxlib, with version [35].*here it is 2"):
            library.load(build.built())
    source = tmp_path / "wrong.cc"
    version = library.load(build.built()).jaxkv_api_version()
    source.write_text(
        f'extern "C" {{ int jaxkv_api_version() {{ return {version}; }} int jaxkv_self_test() {{ return 223; }} }}'
    )
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))))
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    with pytest.raises(library.Unusable, match="wrong sums here: products with AVX2 instructions, case 3"):
        library.load(other)


@pytest.mark.optimized
def test_without_a_compiler_or_a_directory_or_when_switched_off_attention_runs_all_the_same(tmp_path, monkeypatch):
    q, layer, step = small()
    want = attend(q, layer, step, implementation="blockwise")
    (tmp_path / "file").write_text("")
    cases = (
        ({"PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}, "no C\\+\\+ compiler"),
        ({"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}, "false failed: it ended with status 1"),
        ({"XDG_CACHE_HOME": str(tmp_path / "file")}, "can't be written"),
        ({"JAXKV_NATIVE": "0"}, "switches it off"),
    )
    for environment, reason in cases:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(library, "_LIBRARIES", [])
            library.problem.cache_clear()
            assert re.search(reason, library.problem() or "")
            np.testing.assert_array_equal(attend(q, layer, step), want)
            with pytest.raises(NotSupportedError, match=reason):
                attend(q, layer, step, implementation="native")
    library.problem.cache_clear()
    assert library.problem() is None
    assert {x.suffix for x in (tmp_path / "jaxkv" / "native").iterdir()} == {".lock", ".failed"}


@pytest.mark.parametrize(("target", "machine"), [("aarch64-linux-gnu", 183), ("x86_64-linux-gnu", 62)])
def test_clang_takes_it_for_arm_and_for_all_instructions_of_x86(target, machine, tmp_path):
    zig = pytest.importorskip("ziglang", reason="a compiler for other machines: pip install ziglang")
    command = [os.path.join(os.path.dirname(zig.__file__), "zig"), "c++", "-target", target, "-std=c++17", "-c", "-w"]
    for source in sealed.SOURCES.glob("*.cc"):
        to = tmp_path / f"{source.stem}.o"
        subprocess.run([*command, f"-I{jax.ffi.include_dir()}", source, "-o", to], check=True)
        assert int.from_bytes(to.read_bytes()[18:20], "little") == machine  # e_machine of an ELF file


_SELF_TEST = """
#include <dlfcn.h>
int main(int count, char** names) {
  void* library = dlopen(names[1], RTLD_NOW);
  return library ? ((int (*)(void))dlsym(library, "jaxkv_self_test"))() : 200;
}
"""


@pytest.mark.skipif(not os.environ.get("JAXKV_FULL"), reason="half a minute of compiling; JAXKV_FULL=1 runs it")
def test_on_arm_the_self_test_passes_under_an_emulator(tmp_path, monkeypatch):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("apt-get install g++-aarch64-linux-gnu qemu-user")
    (tmp_path / "main.cc").write_text(_SELF_TEST)
    monkeypatch.setattr(build, "_target", lambda: ("-DJAXKV_SETS=7",))  # those of this machine are not ARM's
    build._compile(compiler, tmp_path / "kernels.so")
    subprocess.run([compiler, tmp_path / "main.cc", "-ldl", "-o", tmp_path / "main"], check=True)
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", tmp_path / "main", tmp_path / "kernels.so"]
    assert subprocess.run(command).returncode == 0


# What runs.


def test_doctor_and_explain_attend_say_what_runs_and_why(capsys):
    q, layer, step = small()
    assert jaxkv.explain_attend(q, layer, step).startswith("native: ")
    assert jaxkv.explain_attend(jnp.ones((ROWS, 17, N, H)), layer, step).startswith("blockwise: of 17 tokens")
    cache = Cache.init([LayerSpec(Full(), K, H, HV, rotary=jaxkv.Rotary(), rotary_at="read")], ROWS, 64)
    assert "does not rotate keys" in jaxkv.explain_attend(q, cache.layers[0], cache.begin(step.positions)[1])
    assert main(["doctor"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["versions"].startswith(f"jaxkv {jaxkv.__version__}, jax {jax.__version__}, ")
    assert said["native"].startswith(f"a library with {library.instruction_set()} instructions, built here, ")
    assert said["attention"].startswith("native for up to 16 tokens ")
    assert said["products"].startswith("native for 2 to 16 tokens ")
    assert said["experts"].startswith("native") and said["rows"].startswith("native")
    assert re.match(r"right: |wrong: .* off by ", said["sums"])


def test_doctor_says_why_there_is_no_library(capsys, monkeypatch):
    monkeypatch.setattr(library, "problem", lambda: "no compiler")
    assert main(["doctor"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["native"] == "not there: no compiler"
    assert [part for part, form in said.items() if form == "as XLA compiles it"] == [*doctor._parts()]


def test_the_environment_chooses_among_the_instructions_that_a_library_has(monkeypatch):
    best = library.instruction_set()
    for name in build.SETS:
        monkeypatch.setenv("JAXKV_NATIVE", name)
        assert library.instruction_set() in (name, best)  # one that is built here has the best only
    monkeypatch.setenv("JAXKV_NATIVE", best.lower())
    assert library.instruction_set() == best
