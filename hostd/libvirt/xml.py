"""Parsing and writing XML of libvirt without ever reaching outside of it.

No entity is resolved, no DTD loaded and nothing fetched: a definition comes from
another host, and its text is not to be trusted.
"""

from __future__ import annotations

from lxml import etree


class XmlError(ValueError):
    """The text is not XML that Drover takes."""


def parse(text: str, *roots: str) -> etree._Element:
    """Parse a document.

    Args:
        text: The document.
        roots: Names that its root element may have; any when none is given.

    Raises:
        XmlError: It is not well-formed, has a DTD, or another root element.
    """
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        huge_tree=False,
        remove_blank_text=False,
    )
    try:
        root = etree.fromstring(text.encode("utf-8"), parser)
    except (etree.XMLSyntaxError, UnicodeEncodeError) as error:
        raise XmlError(f"not well-formed: {error}") from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise XmlError("it has a document type, which libvirt never writes")
    if roots and root.tag not in roots:
        raise XmlError(f"the root element is <{root.tag}>, not <{'> or <'.join(roots)}>")
    return root


def to_text(root: etree._Element) -> str:
    """Write an element as it was read."""
    return etree.tostring(root, encoding="unicode", with_tail=False)


def attribute(element: etree._Element | None, name: str) -> str:
    """An attribute's value; empty when either is missing."""
    return "" if element is None else (element.get(name) or "")


def text_of(element: etree._Element | None) -> str:
    """An element's text, stripped; empty when there is none."""
    return "" if element is None else (element.text or "").strip()
