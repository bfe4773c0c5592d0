//! What the bytes of a copy are: a container's own, or what a guest sees in it.

/// How a volume is copied. It stands in OPEN, and in every receipt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum CopyMode {
    /// The bytes of a file or a device as they are: snapshots, bitmaps and
    /// encryption of an image stay.
    #[default]
    Verbatim = 0,
    /// The disk as its guest sees it, read from an export: flat, and of no format.
    GuestVisible = 1,
}

impl CopyMode {
    /// What receipts call it.
    pub fn name(self) -> &'static str {
        match self {
            CopyMode::Verbatim => "verbatim",
            CopyMode::GuestVisible => "guest-visible",
        }
    }

    /// From the name.
    pub fn from_name(name: &str) -> Option<CopyMode> {
        let all = [CopyMode::Verbatim, CopyMode::GuestVisible];
        all.into_iter().find(|mode| mode.name() == name)
    }

    /// From the byte of OPEN and RECEIPT.
    pub fn from_wire(byte: u8) -> Option<CopyMode> {
        let all = [CopyMode::Verbatim, CopyMode::GuestVisible];
        all.into_iter().find(|mode| *mode as u8 == byte)
    }
}
