//! What the stand-alone tool lets every sender of the CA write.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::beneath;
use crate::error::{Code, MoverError, Result};
use crate::seeds::SeedSpec;
use crate::target::{Care, Container, Place, Proof, TargetSpec, Trust};

/// A directory for new files, and devices by the names that senders give them.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Where files are placed; journals and receipts of devices too.
    pub root: PathBuf,
    /// Block devices that may be overwritten.
    pub devices: HashMap<String, PathBuf>,
    /// What is believed of an earlier attempt.
    pub trust: Trust,
    /// What is proven before something is published.
    pub proof: Proof,
    /// Files whose content may be reused.
    pub seeds: Vec<SeedSpec>,
    /// What is made of what is sent.
    pub container: Container,
    /// Whether a sender may bring a file that it placed up to date.
    pub update: bool,
}

impl Offer {
    /// A directory for new files, and nothing special.
    pub fn files(root: PathBuf) -> Offer {
        Offer {
            root,
            devices: HashMap::new(),
            trust: Trust::default(),
            proof: Proof::default(),
            seeds: Vec::new(),
            container: Container::default(),
            update: false,
        }
    }

    /// Fails when it could never be taken up.
    pub fn check(&self) -> Result<()> {
        beneath::open_root(&self.root)?;
        for (name, device) in &self.devices {
            beneath::check_name(name)?;
            if device.parent().is_none() || device.file_name().is_none() {
                let text = format!("{} is not a device", device.display());
                return Err(MoverError::new(Code::InvalidArgument, text).at_receiver());
            }
        }
        Ok(())
    }

    /// The target of this name.
    pub fn target(&self, name: &str) -> TargetSpec {
        let device = self.devices.get(name);
        let place = device.and_then(|path| Some((path.parent()?, path.file_name()?.to_str()?)));
        let (root, file, place) = match place {
            Some((parent, node)) => {
                let state = self.root.clone();
                (parent.to_owned(), node, Place::Device { state })
            }
            None => (self.root.clone(), name, Place::File),
        };
        TargetSpec {
            volume: name.to_owned(),
            root,
            name: file.to_owned(),
            size: None,
            mode: None,
            uid: None,
            gid: None,
            care: Care {
                place,
                trust: self.trust,
                proof: self.proof,
                seeds: self.seeds.clone(),
                container: self.container,
                // Its receipt and whoever asks how it ended say what it is.
                degraded: true,
                update: self.update,
            },
        }
    }
}
