"""What an error says about names that do not exist."""

from difftrain.core.errors import nearest


def test_the_nearest_known_name_comes_first_and_all_of_them_follow():
    assert (
        nearest("cosin", ["linear", "cosine"]) == " (did you mean 'cosine'?); known: cosine, linear"
    )


def test_without_a_near_name_only_the_known_ones_are_listed():
    assert nearest("xyz", ["linear", "cosine"]) == "; known: cosine, linear"
    assert nearest("xyz", []) == "; known: none"
