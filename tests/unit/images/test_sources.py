"""Where packages come from: mirrors, proxies, keys, indexes, versions, recipes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.images import ImageStore
from vmlab.images import recipe as recipes
from vmlab.images.debian import apt, mirrors, openpgp, versions
from vmlab.images.debian.apt import AptConfiguration, Source
from vmlab.images.debian.index import PackageIndex
from vmlab.images.debian.mirrors import Given
from vmlab.images.errors import (
    ImageError,
    ImageNotFound,
    MirrorError,
    RecipeError,
    UntrustedArchive,
)
from vmlab.images.formats import modinfo
from vmlab.images.importing import base_recipe
from vmlab.images.recipe import Form
from vmlab.images.settings import ImageSettings, load
from vmlab.images.tiny.modules import ModuleTree, tables
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, VmlabError

# ---------------------------------------------------------------------- mirrors

NOTHING = Given()


def source(uri: str, suite: str, components: str = "main", file: str = "x.list") -> Source:
    return Source(uri, suite, tuple(components.split()), Path(file))


def test_setting_comes_before_environment_before_apt() -> None:
    configuration = AptConfiguration(sources=(source("http://c.test/debian", "trixie"),))
    find = functools.partial(mirrors.mirrors, "trixie", apt=configuration)
    environment = {"VMLAB_DEBIAN_MIRROR": "http://b.test/debian/"}
    (first,) = find(setting=Given("http://a.test/debian"), environment=environment)
    assert (first.url, first.origin) == ("http://a.test/debian", "setting")
    (second,) = find(setting=NOTHING, environment=environment)
    assert (second.url, second.origin) == ("http://b.test/debian", "VMLAB_DEBIAN_MIRROR")
    (third,) = find(setting=NOTHING, environment={})
    assert (third.url, third.origin) == ("http://c.test/debian", "apt: x.list")


def test_of_apts_archives_only_debians_own_are_mirrors_and_the_same_suite_comes_first() -> None:
    configuration = AptConfiguration(
        sources=(
            source("http://other.test/repo", "nodistro"),
            source("http://a.test/debian", "bookworm-updates"),
            source("http://a.test/debian-security", "bookworm-security"),
            source("http://b.test/debian", "bookworm"),
            source("http://c.test/thing", "stable", "contrib"),
            source("cdrom:[Debian]", "bookworm"),
            source("http://d.test/debian/", "trixie"),
        )
    )
    found = mirrors.mirrors("trixie", setting=NOTHING, environment={}, apt=configuration)
    assert [mirror.url for mirror in found] == [
        "http://d.test/debian", "http://a.test/debian", "http://b.test/debian",
    ]  # fmt: skip


APT = AptConfiguration(
    sources=(
        source("http://a.test/debian", "bookworm"),
        source("http://a.test/debian", "bookworm-updates"),
        source("http://a.test/debian-security", "bookworm-security"),
        source("http://a.test/other-security", "focal-security"),
        source("http://a.test/no-main", "bookworm-security", "contrib"),
    )
)


@pytest.mark.parametrize(
    ("settings", "environment", "apt", "pockets"),
    [
        ({}, {}, APT, ["trixie-updates", "trixie-security"]),
        ({}, {}, AptConfiguration(sources=APT.sources[:1]), []),
        ({}, {}, AptConfiguration(sources=APT.sources[:2]), ["trixie-updates"]),
        ({"wanted": ()}, {}, APT, []),
        ({"wanted": ("security",)}, {}, AptConfiguration(), ["trixie-security"]),
        # Whoever names a mirror wants nothing from elsewhere.
        ({"setting": Given("http://b.test/debian")}, {}, APT, ["trixie-updates"]),
        ({}, {"VMLAB_DEBIAN_MIRROR": "http://b.test/debian"}, APT, ["trixie-updates"]),
        (
            {},
            {"VMLAB_DEBIAN_MIRROR": "http://b.test/debian",
             "VMLAB_DEBIAN_SECURITY_MIRROR": "http://b.test/security"},
            AptConfiguration(),
            ["trixie-updates", "trixie-security"],
        ),
    ],
)  # fmt: skip
def test_pockets_are_those_that_apt_uses_or_that_the_given_mirrors_can_have(
    settings: dict[str, Any],
    environment: dict[str, str],
    apt: AptConfiguration,
    pockets: list[str],
) -> None:
    given = {"wanted": None, "setting": NOTHING, **settings}
    assert mirrors.pockets("trixie", environment=environment, apt=apt, **given) == pockets


def test_security_has_an_archive_of_its_own() -> None:
    find = functools.partial(mirrors.mirrors, "trixie-security")
    (found,) = find(setting=NOTHING, environment={}, apt=APT)
    assert found.url == "http://a.test/debian-security"
    variables = {"VMLAB_DEBIAN_SECURITY_MIRROR": "http://c.test/security/"}
    (found,) = find(setting=NOTHING, environment=variables, apt=APT)
    assert (found.url, found.origin) == ("http://c.test/security", "VMLAB_DEBIAN_SECURITY_MIRROR")
    (found,) = find(setting=Given(None, "file:///s"), environment=variables, apt=APT)
    assert (found.url, found.origin) == ("file:///s", "setting")
    with pytest.raises(MirrorError) as caught:
        find(setting=Given("http://b.test/debian"), environment={}, apt=APT)
    assert "VMLAB_DEBIAN_SECURITY_MIRROR" in (caught.value.hint or "")
    with pytest.raises(MirrorError, match="VMLAB_DEBIAN_SECURITY_MIRROR = 'nowhere'"):
        find(setting=NOTHING, environment={"VMLAB_DEBIAN_SECURITY_MIRROR": "nowhere"}, apt=APT)


def test_host_without_a_mirror_is_told_what_to_set() -> None:
    with pytest.raises(MirrorError) as caught:
        mirrors.mirrors("trixie", setting=NOTHING, environment={}, apt=AptConfiguration())
    assert "VMLAB_DEBIAN_MIRROR" in (caught.value.hint or "")


@pytest.mark.parametrize("url", ["ftp://a.test/debian", "debian", "http:", "", " "])
def test_mirror_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(MirrorError):
        mirrors.mirrors("trixie", setting=Given(url), environment={}, apt=AptConfiguration())


def test_password_in_a_mirrors_url_is_not_shown() -> None:
    mirror = mirrors.Mirror("http://user:secret@a.test:81/debian", "setting")
    assert mirror.shown == "http://user:***@a.test:81/debian"


def test_apt_dump_is_read() -> None:
    settings = apt.parse_settings(
        'Acquire "";\nAcquire::Check-Valid-Until "false";\nacquire::http::Proxy "http://p:1/";\n'
        'A::B:: "x";\nbroken\n'
    )
    configuration = AptConfiguration(settings)
    assert configuration.flag("Acquire::Check-Valid-Until", True) is False
    assert configuration.flag("Acquire::Check-Date", True) is True
    assert configuration.proxy("http://a.test/x") == "http://p:1/"
    assert configuration.proxy("https://a.test/x") is None


def test_proxy_of_apt_comes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://env.test:1")
    monkeypatch.setenv("no_proxy", "direct.test")
    of_apt = AptConfiguration({"acquire::http::proxy": "http://apt.test:2",
                               "acquire::http::proxy::special.test": "DIRECT"})  # fmt: skip
    none = AptConfiguration()
    assert mirrors.proxy_for("http://a.test/", apt=of_apt) == "http://apt.test:2"
    assert mirrors.proxy_for("http://special.test/", apt=of_apt) is None
    assert mirrors.proxy_for("http://a.test/", apt=none) == "http://env.test:1"
    assert mirrors.proxy_for("http://direct.test/", apt=none) is None
    assert mirrors.proxy_for("file:///srv", apt=of_apt) is None


def test_proxy_that_is_no_http_proxy_is_refused() -> None:
    socks = AptConfiguration({"acquire::http::proxy": "socks5h://me:secret@p.test:1"})
    with pytest.raises(MirrorError, match="neither http nor https") as caught:
        mirrors.proxy_for("http://a.test/", apt=socks)
    assert "secret" not in caught.value.message


def test_proxy_detector_of_the_host_is_asked(tmp_path: Path) -> None:
    detector = tmp_path / "detect"
    detector.write_text("#!/bin/sh\ncase $1 in *a.test*) echo http://p.test:3 ;; esac\n")
    detector.chmod(0o755)
    configuration = AptConfiguration({"acquire::http::proxy-auto-detect": str(detector)})
    assert configuration.proxy("http://a.test/") == "http://p.test:3"
    assert configuration.proxy("http://b.test/") is None


def test_both_forms_of_source_files_are_read(tmp_path: Path) -> None:
    one_line = (
        "# comment\ndeb [arch=amd64 signed-by=/k.gpg] http://a.test/debian trixie main contrib\n"
        "deb-src http://a.test/debian trixie main\ndeb http://b.test/debian sid\n"
    )
    assert list(apt.parse_sources(one_line, Path("s.list"))) == [
        source("http://a.test/debian", "trixie", "main contrib", "s.list"),
        source("http://b.test/debian", "sid", "", "s.list"),
    ]
    listed = tmp_path / "mirrors"
    listed.write_text("http://m1.test/debian\tpriority:1\n# no\nhttp://m2.test/debian\n")
    stanzas = (
        "Types: deb deb-src\nURIs: http://c.test/debian\nSuites: trixie trixie-updates\n"
        f"Components: main\n\nTypes: deb\nURIs: mirror+file://{listed}\nSuites: trixie\n"
        "Components: main\n\nEnabled: no\nTypes: deb\nURIs: http://d.test\nSuites: trixie\n"
    )
    found = [(item.uri, item.suite) for item in apt.parse_sources(stanzas, Path("s.sources"))]
    assert found == [
        ("http://c.test/debian", "trixie"), ("http://c.test/debian", "trixie-updates"),
        ("http://m1.test/debian", "trixie"), ("http://m2.test/debian", "trixie"),
    ]  # fmt: skip
    assert list(apt.parse_sources("Types: deb\nbroken\n", Path("s.sources"))) == []


@given(st.text(max_size=200))
def test_any_source_file_can_be_read(text: str) -> None:
    for name in ("a.list", "a.sources"):
        for item in apt.parse_sources(text, Path(name)):
            assert item.file == Path(name)


# ---------------------------------------------------------------------- keys


def test_shipped_keys_are_the_published_ones() -> None:
    assert len(openpgp.archive_keys()) == 6


def test_exchanged_key_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "debian-13-stable.asc"
    monkeypatch.setitem(openpgp.ARCHIVE_KEYS, name, "0" * 40)
    with pytest.raises(UntrustedArchive, match=name):
        openpgp.archive_keys()


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=60)
def test_any_message_is_refused(data: bytes, signed: bool) -> None:
    head = b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n" if signed else b""
    with pytest.raises(UntrustedArchive):
        openpgp.verify(head + data, openpgp.archive_keys(), source="x")


# ---------------------------------------------------------------------- index and versions


INDEX = b"""Package: tool
Version: 1.0
Filename: pool/tool_1.0.deb
Size: 10
SHA256: %(a)b
Depends: libc6 (>= 2.3), missing | mail-agent, awk:any
Pre-Depends: dpkg

Package: tool
Version: 1:0.9
Filename: pool/tool_0.9.deb
Size: 11
SHA256: %(a)b

Package: libc6
Version: 2.4
Filename: pool/libc6.deb
Size: 12
SHA256: %(a)b
Depends: tool

Package: postman
Version: 1
Filename: pool/postman.deb
Size: 13
SHA256: %(a)b
Provides: smtp, mail-agent (= 1)

Package: bad
Version: 1
Filename: ../../etc/passwd
Size: 1
SHA256: %(a)b
""" % {b"a": b"a" * 64}


def test_newest_version_is_found_and_providers_stand_in() -> None:
    index = PackageIndex(INDEX, source="test index")
    assert index.get("tool").version == "1:0.9"
    assert index.get("mail-agent").name == "postman"
    assert index.get("smtp").name == "postman"
    with pytest.raises(ImageNotFound, match="test index has no package 'mail'"):
        index.get("mail")


def test_closure_follows_dependencies_in_circles_and_alternatives() -> None:
    index = PackageIndex(INDEX.replace(b"1:0.9", b"0.9"), source="x")
    found = index.closure(["tool"], without=("awk", "dpkg"))
    assert [package.name for package in found] == ["libc6", "postman", "tool"]
    with pytest.raises(ImageNotFound, match="'awk'"):
        index.closure(["tool"], without=("dpkg",))


def test_newest_version_is_found_in_whichever_suite_has_it() -> None:
    def package(name: str, version: str) -> bytes:
        return (f"Package: {name}\nVersion: {version}\nFilename: pool/{name}_{version}.deb\n"
                f"Size: 1\nSHA256: {'0' * 64}\n").encode()  # fmt: skip

    index = PackageIndex.merged([
        PackageIndex(package("aa", "1") + b"\n" + package("bb", "2"), source="main", suite="x"),
        PackageIndex(b"", source="updates", suite="x-updates"),
        PackageIndex(package("aa", "1.1") + b"\n" + package("bb", "2") + b"\n" + package("cc", "3"),
                     source="security", suite="x-security"),
    ])  # fmt: skip
    found = {name: (index.get(name).version, index.get(name).suite) for name in ("aa", "bb", "cc")}
    assert found == {"aa": ("1.1", "x-security"), "bb": ("2", "x"), "cc": ("3", "x-security")}
    older = index.by_filename("pool/aa_1.deb")
    assert older is not None
    assert (older.version, older.suite) == ("1", "x")
    with pytest.raises(ImageNotFound, match=r"main \(and updates, security\) has no package 'dd'"):
        index.get("dd")
    with pytest.raises(ImageError, match="security has a broken entry"):
        PackageIndex.merged([
            PackageIndex(b"", source="main"),
            PackageIndex(package("aa", "1").replace(b"0" * 64, b"0"), source="security"),
        ]).get("aa")  # fmt: skip


def test_path_that_leads_out_of_the_archive_is_refused() -> None:
    with pytest.raises(ImageError, match="broken entry for 'bad'"):
        PackageIndex(INDEX, source="x").get("bad")


@given(st.binary(max_size=300))
def test_any_index_is_searched_without_harm(data: bytes) -> None:
    for text in (data, b"Package: tool\n" + data):
        try:
            PackageIndex(text, source="x").closure(["tool"])
        except VmlabError:
            continue


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.0", "1.1"), ("1.9", "1.10"), ("1.0~rc1", "1.0"), ("1.0", "1.0-1"), ("2.0", "1:1.0"),
        ("1.0-1", "1.0-1+b1"), ("1.0a", "1.0+"), ("1.0-1~bpo1", "1.0-1"), ("6.12.94", "6.12.107"),
        ("1.0.", "1.0.1"), ("1.0-1-1", "1.0-1-2"),
    ],
)  # fmt: skip
def test_versions_sort_as_dpkg_sorts_them(older: str, newer: str) -> None:
    assert versions.key(older) < versions.key(newer)
    assert not versions.key(newer) < versions.key(older)


# ---------------------------------------------------------------------- modules


Forms = dict[str, Callable[..., bytes]]


def module_tree(forms: Forms, modules: dict[str, str], builtin: str = "") -> ModuleTree:
    files = {
        f"kernel/{name}.ko": forms["module"](name.replace("-", "_"), depends)
        for name, depends in modules.items()
    }
    return ModuleTree(
        "6.1", files, read=files.__getitem__, size=lambda path: len(files[path]), builtin=builtin
    )


def test_modules_are_chosen_with_their_dependencies_before_them(forms: Forms) -> None:
    tree = module_tree(
        forms, {"a": "b,c", "b": "d", "c": "d", "d": "", "other-one": ""}, "kernel/fs/builtin.ko"
    )
    chosen = tree.select(["a", "builtin", "missing?"], ["other_one"], [])
    names = [module.info.name for module in chosen.modules]
    assert names == ["d", "b", "c", "a", "other_one"]
    assert (chosen.load, chosen.late) == (("a",), ("other_one",))
    dep = tables(chosen.modules)["modules.dep"].splitlines()
    assert "kernel/a.ko: kernel/c.ko kernel/b.ko kernel/d.ko" in dep
    assert "kernel/d.ko:" in dep


@pytest.mark.parametrize(
    ("modules", "message"),
    [({"b": ""}, "has no module 'a'"), ({"a": "gone"}, "'a' of the kernel 6.1 needs 'gone'")],
)
def test_missing_module_is_named(forms: Forms, modules: dict[str, str], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        module_tree(forms, modules).select(["a"], [], [])


def test_modules_that_need_each_other_do_not_hang(forms: Forms) -> None:
    chosen = module_tree(forms, {"a": "b", "b": "a"}).select(["a"], [], [])
    assert {module.info.name for module in chosen.modules} == {"a", "b"}
    assert len(tables(chosen.modules)["modules.dep"].splitlines()) == 2


def test_names_of_modules_have_one_spelling() -> None:
    for spelling in ("virtio-net", "kernel/drivers/net/virtio_net.ko.xz", "virtio_net.ko"):
        assert modinfo.module_name(spelling) == "virtio_net"


# ---------------------------------------------------------------------- recipes and settings


def test_built_in_recipes_are_all_valid_and_cover_the_four_architectures() -> None:
    names = recipes.builtin_names()
    assert {"debian-13-riscv64-tiny", "debian-12-amd64-tiny", "debian-13-arm64-tiny",
            "debian-13-ppc64el-tiny"} <= set(names)  # fmt: skip
    tiny = {}
    for name in names:
        recipe = recipes.builtin(name)
        assert recipe.name == name
        if recipe.tiny:
            tiny[recipe.architecture] = recipe
    assert set(tiny) == set(Architecture)


def test_kernel_of_ones_own_is_lent_the_initramfs_of_the_tiny_image_with_the_agent() -> None:
    for architecture in Architecture:
        recipe = base_recipe(ImageStore(settings=ImageSettings()), None, architecture)
        assert recipe.architecture is architecture
        assert recipe.channels == ("agent", "console")


def test_every_virtual_device_that_reports_a_panic_has_its_driver_where_the_kernel_has_one(
    forms: Forms,
) -> None:
    available = recipes.builtin("debian-12-amd64-tiny").modules.expanded()[2]
    with_them = module_tree(forms, {"pvpanic": "", "pvpanic_mmio": "pvpanic",
                                    "pvpanic_pci": "pvpanic"})  # fmt: skip
    chosen = with_them.select([], [], [name for name in available if "pvpanic" in name])
    names = [module.info.name for module in chosen.modules]
    assert names == ["pvpanic", "pvpanic_mmio", "pvpanic_pci"]
    without = module_tree(forms, {"other": ""})
    assert without.select([], [], [name for name in available if "pvpanic" in name]).modules == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "../x"}, "suite = '../x'"),
        ({"architecture": "sparc"}, "architecture = 'sparc'"),
        ({"kernel": "Linux"}, "kernel = 'Linux'"),
        ({"packages": ["a b"]}, "packages.0"),
        ({"package": ["a"]}, "did you mean 'packages'"),
        ({"format": "vmdk"}, "format"),
        ({"size": "1G"}, "size is for a disk"),
        ({"format": "raw"}, "needs a size"),
        ({"files": [{"path": "etc/x", "text": ""}]}, "absolute path"),
        ({"files": [{"path": "/etc/../x", "text": ""}]}, "absolute path"),
        ({"files": [{"path": "/x"}]}, "either text or source"),
        ({"files": [{"path": "/x", "text": "", "mode": "rw"}]}, "octal"),
        ({"scripts": [{"name": "a", "text": "true", "when": "build"}]}, "put together"),
        ({"channels": ["telnet"]}, "telnet"),
        ({"modules": {"load": ["a;b"]}}, "modules.load.0"),
        ({"cmdline": "a\nb"}, "one line"),
        ({"format": "raw", "size": "1G", "without": ["perl"]}, "without is for an initramfs"),
        ({"distribution": "fedora"}, "distribution"),
    ],
)
def test_wrong_recipe_is_refused_with_field_and_value(
    change: dict[str, object], message: str
) -> None:
    data = {"name": "x", "suite": "trixie", "architecture": "riscv64", "kernel": "linux-image-a"}
    recipes.from_data(data)
    with pytest.raises(RecipeError, match=message) as caught:
        recipes.from_data({**data, **change})
    assert caught.value.hint


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_clear_error(text: str) -> None:
    with pytest.raises(RecipeError):
        recipes.parse(text)


@given(
    st.dictionaries(
        st.sampled_from(["name", "suite", "architecture", "kernel", "packages", "modules", "files",
                         "scripts", "size", "format", "cmdline", "channels", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=10),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=6), inner, max_size=3),
            max_leaves=5,
        ),
    )
)  # fmt: skip
def test_any_data_is_a_recipe_or_a_clear_error(data: dict[str, object]) -> None:
    try:
        recipes.from_data(data)
    except RecipeError as error:
        assert error.hint


def test_recipe_of_a_disk_has_its_size_in_bytes() -> None:
    recipe = recipes.from_data(
        {"name": "x", "suite": "sid", "architecture": "amd64", "kernel": "linux-image-amd64",
         "format": "qcow2", "size": "2G"}
    )  # fmt: skip
    assert recipe.format is Form.QCOW2
    assert recipe.size == 2 << 30


def test_missing_file_of_a_recipe_is_named(tmp_path: Path) -> None:
    from vmlab.images.builder import inputs

    path = tmp_path / "r.toml"
    path.write_text(
        'name = "x"\nsuite = "sid"\narchitecture = "riscv64"\nkernel = "linux-image-a"\n'
        '[[files]]\npath = "/a"\nsource = "nothing"\n'
    )
    with pytest.raises(RecipeError, match=r"files\.source = .*nothing"):
        inputs(recipes.read(path), None)


def test_settings_come_from_file_then_environment(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[images]\nlimit = "1G"\nstore = "/from/file"\n')
    environment = {"VMLAB_CONFIG": str(config), "VMLAB_IMAGE_STORE": "/from/environment"}
    settings = load(environment)
    assert settings.limit == 1 << 30
    assert settings.directory == Path("/from/environment")
    assert load({"VMLAB_CONFIG": str(config)}).directory == Path("/from/file")
    missing = {"VMLAB_CONFIG": str(tmp_path / "none"), "VMLAB_HOME": "/home/of/vmlab"}
    assert load(missing).directory == Path("/home/of/vmlab/images")
    assert load(missing).limit == ImageSettings().limit


@pytest.mark.parametrize(
    ("text", "message"),
    [("[images]\nlimit = 'much'", "limit = 'much'"), ("[images]\nlimits = 1", "limits"),
     ("images = 1", "has to be a table"), ("[", "cannot be read")],
)  # fmt: skip
def test_wrong_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    with pytest.raises((InvalidSpec, ImageError), match=message):
        load({"VMLAB_CONFIG": str(config)})


def test_recipe_of_the_guide_is_valid() -> None:
    guide = Path(__file__).parents[3] / "docs" / "how-to" / "build-an-image.md"
    text = guide.read_text("utf-8").split("```toml\n", 1)[1].split("```", 1)[0]
    recipe = recipes.parse(text)
    assert recipe.tiny
    assert "nbd" in recipe.modules.expanded()[0]
    assert recipe.without == ("debconf",)


def test_schema_of_a_recipe_accepts_those_that_come_with_vmlab() -> None:
    import tomllib

    import jsonschema

    from vmlab.cli.schema import Document, schema_of

    schema = schema_of(Document.RECIPE)
    for name in recipes.builtin_names():
        jsonschema.validate(tomllib.loads(recipes.builtin_text(name)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x"}, schema)
