"""Animations: whole pages that need no network, and the same for the same training."""

import re
from types import SimpleNamespace

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from prunestudy.study.figures import film as films
from prunestudy.study.figures.film import film, slide


def _film(heights):
    figure, axes = plt.subplots(figsize=(3, 2))

    def draw(height):
        axes.clear()
        axes.bar([0], [height])
        axes.set(ylim=(0, 3), title=f"height {height}")

    return film(figure, draw, heights).data


def test_a_film_has_each_frame_once_and_asks_for_nothing_from_the_network():
    page = _film([1, 2, 3])
    frames = re.findall(r'frames\[(\d)\] = "data:image/png;base64,([^"]+)"', page)
    assert [number for number, _ in frames] == ["0", "1", "2"]
    assert len({frame for _, frame in frames}) == 3
    assert "http" not in page.replace("http://www.w3.org", "") and "fa-" not in page
    assert 'alt="height 3"' in page
    assert len(page) < 60_000
    assert not plt.get_fignums()


def test_the_same_frames_give_the_same_page_and_others_another_name():
    first, again, other = _film([1, 2]), _film([1, 2]), _film([2, 1])
    assert first == again
    names = [re.search(r"_anim_img(\w+)", page)[1] for page in (first, other)]
    assert names[0] != names[1]


@pytest.mark.parametrize("person", [True, False])
def test_a_slider_is_live_only_where_a_person_can_be_asked(monkeypatch, person):
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=person))
    monkeypatch.setattr(films, "get_ipython", lambda: shell)
    made = []
    monkeypatch.setattr(ipywidgets, "interact", lambda show, value: made.append(value))
    figure, axes = plt.subplots(figsize=(3, 2))
    page = slide(figure, lambda height: axes.set(title=f"height {height}"), [1, 2], "height")
    assert (page is None) == person
    assert [slider.options for slider in made] == [(1, 2)] * person
    assert not plt.get_fignums()
