"""Which backends are installed: by entry points, without an import of any."""

import pytest

import qcore
from qcore import errors
from qcore.plugins import hookspecs


def test_the_reference_backend_is_always_installed():
    found = next(b for b in qcore.installed_backends() if b.name == "reference")
    assert found.distribution == "qcore-fx"
    assert qcore.get_backend("reference").availability.ok


def test_a_distribution_gives_aliases_to_its_own_backends_only_and_none_that_is_a_name(on_disk):
    on_disk("aa-first", "one = nowhere\ntwo = nowhere", "uno = one\ntwo = one\nreference = one\neins = one")
    on_disk("zz-second", "three = nowhere", "quick = one\none = three")
    listed = {found.name: (found.distribution, found.aliases) for found in qcore.installed_backends()}
    assert listed["one"] == ("aa-first", ("eins", "uno"))
    assert listed["two"] == ("aa-first", ())
    assert listed["three"] == ("zz-second", ())
    with pytest.raises(errors.BackendNotFoundError, match="zz-second calls 'one' so, but only the distribution that"):
        qcore.get_backend("quick")


def test_distributions_of_one_backend_are_all_listed_and_damaged_ones_hide_none(on_disk):
    on_disk("aa-toy", "toy = nowhere")
    on_disk("zz-toy", "toy = elsewhere")
    on_disk("damaged", "dented = nowhere", metadata=False)
    found = [(b.name, b.distribution) for b in qcore.installed_backends() if b.name in ("toy", "dented")]
    assert found[1:] == [("toy", "aa-toy"), ("toy", "zz-toy")]
    assert found[0][0] == "dented"


def test_no_distribution_takes_the_name_of_the_core_s_own_backend(on_disk):
    on_disk("aa-evil", "reference = nowhere")
    with pytest.warns(errors.QcoreWarning, match=r"'reference' \(aa-evil 1.2.3\) is left out: that name is the core's"):
        listed = [found.distribution for found in qcore.installed_backends() if found.name == "reference"]
    assert listed == ["qcore-fx"]
    assert qcore.get_backend("reference").availability.ok


def test_a_plugin_may_be_an_object_in_a_module(on_disk):
    code = "from qcore.plugins import reference\nclass Plugin:\n" + "".join(
        f"    {name} = staticmethod(reference.{name})\n" for name in hookspecs.REQUIRED
    )
    on_disk("toy", "toy_object = toy_module:PLUGIN", module="toy_module", code=code + "PLUGIN = Plugin()\n")
    with pytest.raises(errors.PluginError, match="'toy_object' .toy 1.2.3. can't be used: it calls itself 'reference'"):
        qcore.get_backend("toy_object")
