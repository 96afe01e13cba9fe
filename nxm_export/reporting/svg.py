"""From matplotlib's SVG to one that a page with a strict content security policy can hold, in the colours of its
theme."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

# Placeholders: what the style sheet calls ink, muted, line, panel (what a picture stands on) and s1 to s6.
INK, MUTED, LINE, PANEL = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505", "#0a0606")
_CLASSES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PANEL: "panel",
    **{color: f"s{i + 1}" for i, color in enumerate(SERIES)},
}


def inline(svg: str, key: str, title: str, description: str) -> str:
    """The drawing without inline styles, with ids of its own (`key`), a title and a description."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
            elif child.tag == "text" and child.get("transform") == "":
                child.attrib.pop("transform")
    links = {
        link for element in root.iter() for value in element.attrib.values() for link in re.findall(r"#([\w-]+)", value)
    }
    for element in root.iter():
        _restyle(element)
        _rename(element, key, links)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-desc", "stroke-linejoin": "round"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        node = ElementTree.Element(tag, id=f"{key}-{tag}")
        node.text = text
        root.insert(place, node)
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(element: ElementTree.Element) -> None:
    """Declarations of a ``style`` become attributes; placeholder colours become classes."""
    classes = []
    for name, value in _declarations(element.attrib.pop("style", "")).items():
        if name in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{name}-{_CLASSES[value]}")
        elif name == "image-rendering":
            classes.append("pixels")
        else:
            element.set(name, value)
    for name in ("fill", "stroke"):
        if element.get(name) in _CLASSES:
            classes.append(f"{name}-{_CLASSES[element.attrib.pop(name)]}")
    if classes:
        element.set("class", " ".join(dict.fromkeys(classes)))


def _declarations(style: str) -> Mapping[str, str]:
    """CSS declarations by name, ``font`` taken apart, as it is no attribute of its own."""
    declared: dict[str, str] = {}
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = re.search(r"([\d.]+)px", value)
            declared |= {"font-size": size[1]} if size else {}
        elif name and not name.startswith("font-family"):
            declared[name] = value
    return declared


def _rename(element: ElementTree.Element, key: str, links: set[str]) -> None:
    """Ids are the picture's own where something refers to them, and gone otherwise."""
    own = element.attrib.pop("id", None)
    if own in links:
        element.set("id", f"{key}-{own}")
    for name, value in element.attrib.items():
        if name == "href" and value.startswith("#"):
            element.set(name, f"#{key}-{value[1:]}")
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{key}-"))
