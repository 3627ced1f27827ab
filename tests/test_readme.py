"""What the README names is there."""

import re


def test_every_file_of_the_tree_exists(repository):
    tree = re.search(r"```\nparams\.yaml.*?```", (repository / "README.md").read_text(), re.S)[0]
    folder = ""
    for line in tree.splitlines()[1:-1]:
        branch, name = re.match(r"([├└─ ]*)(\S+)", line).groups()
        folder = "" if not branch else folder
        assert (repository / folder / name).exists(), line
        folder = name if not branch and name.endswith("/") else folder


def test_every_make_target_and_module_that_is_named_exists(repository):
    readme, makefile = (repository / "README.md").read_text(), (repository / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z]+)", readme))
    assert targets >= {"repro", "test", "server", "worker", "flow", "track", "ui"}
    assert all(re.search(rf"^{target}[ :]|^[a-z ]*\b{target}\b.*:", makefile, re.M) for target in targets)
    assert all((repository / f"{module.replace('.', '/')}.py").exists() for module in re.findall(r"-m (flows\.\w+)", readme))


def test_every_make_target_appears_in_the_readme_or_explains_itself(repository):
    makefile = (repository / "Makefile").read_text()
    named = re.search(r"\.PHONY: (.*)", makefile)[1].split()
    assert all(re.search(rf"^{name}\b.*##", makefile, re.M) for name in named)
