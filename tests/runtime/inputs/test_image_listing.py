"""Images of a folder or a glob: which files, in which order, under which keys."""

import os
from collections import Counter
from pathlib import Path

import pytest

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.inputs.image_listing import ImageFile, counted, given_images, list_images


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", "z.jpeg", "c/d/1.tiff", "notes.txt", "b/.hidden.jpg", ".git/x.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "in" / "folder.jpg").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "in" / "a.webp")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "in" / "none.webp")
    (tmp_path / "in" / "c" / "circle").symlink_to(tmp_path / "in")
    return tmp_path / "in"


def keys(source):
    return [image.key for image in list_images(str(source))]


def test_a_folder_files_first_then_folders_by_name(tree, monkeypatch):
    expected = ["a.webp", "gone.png", "link.png", "z.jpeg", "b/10.jpg", "b/2.PNG", "c/d/1.tiff"]
    assert keys(tree) == keys("in") == keys("in/") == expected
    assert all((tree / image.key).resolve() == Path(image.path).resolve() for image in list_images("in"))
    listed = os.scandir

    class Reversed:
        def __init__(self, folder):
            self.entries = listed(folder)

        def __enter__(self):
            return reversed(list(self.entries))

        def __exit__(self, *error):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)  # a file system's order is anyone's guess
    assert keys(tree) == expected


def test_a_glob_takes_what_it_matches_relative_to_its_fixed_part(tree):
    (tree / "folder.jpg" / "1.jpg").touch()
    assert keys("in/*") == ["a.webp", "gone.png", "link.png", "notes.txt", "z.jpeg"]
    assert keys("in/b/*.jpg") == ["10.jpg"]
    assert keys(f"{tree}/**/*.[jt]*") == ["b/10.jpg", "c/d/1.tiff", "folder.jpg/1.jpg", "notes.txt", "z.jpeg"]
    assert keys("in/**/*.jpg") == keys("./in/**/*.jpg") == ["b/10.jpg", "folder.jpg/1.jpg"]
    assert keys("**/b/*.jpg") == keys("./**/b/*.jpg") == keys("**/**/b/*.jpg") == ["in/b/10.jpg"]
    assert keys("in/b/**") == ["10.jpg", "2.PNG"]
    assert keys("in/c/*/b/*.jpg") == ["circle/b/10.jpg"]  # a link that is matched is followed, as in shells
    assert keys("*/b/10.*") == ["in/b/10.jpg"]
    assert list(list_images("in/b/2.PNG")) == [ImageFile("2.PNG", "in/b/2.PNG")]
    (tree / "[x]").mkdir()
    (tree / "[x]" / "1.png").touch()
    assert keys("in/[x]") == ["1.png"]  # a folder of that name wins over the pattern


def test_no_two_matches_of_a_glob_have_one_key(tree):
    """``..`` behind a wildcard leads to one file by several ways; a key must not be stored twice."""
    assert keys("in/*/../b/*.jpg") == ["b/../b/10.jpg", "c/../b/10.jpg", "folder.jpg/../b/10.jpg"]
    assert keys("in/../in/b/*.jpg") == ["10.jpg"]
    (tree / "é.png").touch()
    (tree / "e\u0301.png").touch()
    assert {"é.png", "e\u0301.png"} < set(keys(tree))  # two files, unless a file system takes them for one


def test_what_is_passed_over_is_counted(tree):
    passed_over = Counter()
    list(list_images("in", passed_over))
    assert counted(passed_over) == "1 .txt, 1 links to folders"
    assert counted(Counter({f".{number}": number for number in range(1, 13)})).endswith("6 .6, 5 .5, 10 others")
    assert counted(Counter()) == ""


def test_what_is_not_there(tree):
    for wrong in ("in/none", "in/*.bmp"):
        with pytest.raises(MediaError, match="no such folder, and as a glob it matches no file"):
            keys(wrong)
    assert keys("in/folder.jpg") == []
    with pytest.raises(MediaError, match="the input is empty"):
        keys("")  # an unset variable of a script must not mean the current folder


def test_a_folder_that_cannot_be_listed(tree, monkeypatch):
    listed = os.scandir

    def scandir(folder):
        if str(folder).endswith("in/c"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)  # the superuser may list anything
    images = list_images("in")
    assert [next(images).key for _ in range(6)][-1] == "b/2.PNG"
    with pytest.raises(MediaError, match="in/c cannot be listed: Permission denied"):
        next(images)
    with pytest.raises(MediaError, match="in/c cannot be listed: Permission denied"):
        keys("in/**/*.jpg")


def test_images_given_one_by_one():
    assert given_images(["b.png", "a.png"]) == [ImageFile("b.png", "b.png"), ImageFile("a.png", "a.png")]
    with pytest.raises(MediaError, match=r"a\.png is given twice"):
        given_images(["a.png", "b.png", "a.png"])
