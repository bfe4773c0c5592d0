//! Opening a target: what is there already, and what of it can be believed.
//!
//! ```text
//! published before        -> the receipt answers, or it is opened to go on from
//! a journal of this copy  -> what it noted is there; the last of it is read back
//! the copy that a dirty bitmap builds on -> all that did not change is there
//! anything else           -> a base: compared with the source, chunk by chunk; by what
//!                            a journal of the source as it was has noted of it (earlier.rs)
//! nothing                 -> a blank part
//! ```

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::audit::{self, Expected};
use crate::beneath::{self, Names};
use crate::budget::Share;
use crate::degraded;
use crate::device;
use crate::digest::{Bitmap, Hash};
use crate::earlier::Earlier;
use crate::entry;
use crate::error::{Code, MoverError, Result};
use crate::journal::{Journal, Subject};
use crate::ledger::Ledger;
use crate::locked::Locked;
use crate::medium::Medium;
use crate::messages::Receipt;
use crate::mode::CopyMode;
use crate::naming;
use crate::publish;
use crate::qcow2::{Image, Layout};
use crate::rebase;
use crate::receipt::{self, FileId};
use crate::revision::Revision;
use crate::seeds::Seeds;
use crate::source::Identity;
use crate::store::Store;
use crate::target::{Container, Opened, Place, Target, TargetSpec, Trust};
use crate::trust;

/// What a sender announces of a volume.
#[derive(Clone, Debug)]
pub struct Announced {
    /// Identity of the source.
    pub identity: Identity,
    /// What its bytes are.
    pub mode: CopyMode,
    /// What has changed since an earlier copy, if the sender knows.
    pub revision: Option<Revision>,
}

/// An open place for the bytes of a volume, held by this copy alone.
pub struct Site {
    /// Its directory, and the names of its files there.
    pub names: Names,
    /// Which file or device it is.
    pub id: FileId,
    /// The file, for the page cache.
    pub file: File,
    /// What keeps others away from it; a device is opened for one alone.
    pub lock: Option<Locked>,
    /// The same with O_DIRECT, if that works there.
    pub direct: Option<File>,
    /// All of it reads as zero.
    pub blank: bool,
    /// It has the size that it needs.
    pub sized: bool,
    /// Its name proves little: another device can have it after a reboot.
    pub is_device: bool,
}

/// What is known of a site.
pub struct Known {
    /// The site, ready to write.
    pub medium: Medium,
    /// It holds something that the journal does not tell of.
    pub has_base: bool,
    /// What an earlier journal says of that.
    pub earlier: Option<Earlier>,
    /// Other files whose content may be reused.
    pub seeds: Seeds,
    /// What is placed and durable.
    pub ledger: Ledger,
    /// Where that is noted.
    pub journal: Journal,
    /// The image around it, if it gets one.
    pub image: Option<Image>,
    /// What it has of the memory for volumes.
    pub share: Share,
}

/// What stands at a target.
pub enum Found {
    /// This copy has published it before.
    Published(Receipt),
    /// A place to write.
    Open(Site),
}

/// Opens the target of an announced source; resumes if it can.
///
/// `share` is to be of nothing yet: what there is no room for is refused before
/// anything is touched. Reading back can take long: `go_on` is called meanwhile, and
/// ends it.
pub fn open(
    spec: &TargetSpec,
    tag: &str,
    announced: &Announced,
    mut share: Share,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Opened> {
    let identity = announced.identity;
    let image = spec.care.container == Container::Qcow2;
    share.take_volume(identity.size, image)?;
    let image = image_for(spec, announced)?;
    let (start, length) = match &image {
        Some(image) => (image.layout().start(), image.layout().file_size()),
        None => (0, identity.size),
    };
    // A published copy is touched only where the receiver's owner said so.
    let since = announced.revision.as_ref().map(|revision| revision.since);
    let since = since.filter(|_| spec.care.update);
    let found = match &spec.care.place {
        Place::File => find_part(spec, tag, length, since)?,
        Place::Device { state } => device::find(spec, state, tag, identity.size, since, go_on)?,
    };
    let site = match found {
        Found::Published(receipt) => {
            publish::check_kind(spec, tag, &receipt, announced.mode)?;
            degraded::check_found(spec, &receipt)?;
            return Ok(Opened::Published(receipt));
        }
        Found::Open(site) => site,
    };
    let subject = Subject {
        identity,
        tag: *blake3::hash(tag.as_bytes()).as_bytes(),
        part: site.id,
    };
    let (names, id) = (site.names, site.id);
    let seeds = Seeds::open(&spec.care.seeds, &mut share, go_on)?;
    // Blocks of seeds may stand where zeros come later.
    let blank = site.blank && seeds.is_empty();
    let unmeasured = |e| MoverError::target_io("cannot measure a target", &e);
    let medium = Medium::new(site.file, site.direct, blank).map_err(unmeasured)?;
    let medium = medium.behind(start).held_by(site.lock);
    let noted = match site.sized {
        true => Journal::load(&names, &subject, &mut share)?,
        false => None,
    };
    let mut known = match noted {
        None => {
            let is_believed = spec.care.trust == Trust::Normal && !site.is_device;
            let earlier = match is_believed && site.sized && image.is_none() {
                true => Earlier::load(&names, &subject, &mut share)?,
                false => None,
            };
            if !site.sized {
                let sized = medium.set_len(length);
                sized.map_err(|e| MoverError::target_io("cannot size a part", &e))?;
            }
            let mut known = Known {
                has_base: !site.blank,
                earlier,
                seeds,
                ledger: Ledger::new(identity.size),
                journal: Journal::create(&names, &subject)?,
                medium,
                image,
                share,
            };
            if let Some(revision) = announced.revision.as_ref().filter(|_| !site.blank) {
                known.build_on(revision, go_on)?;
            }
            known
        }
        Some(noted) => {
            let suspects = match spec.care.trust {
                Trust::Normal if !site.is_device => noted.recent,
                _ => (0..noted.ledger.segments()).collect(),
            };
            let mut known = Known {
                has_base: false,
                earlier: None,
                seeds,
                ledger: noted.ledger,
                journal: noted.journal,
                medium,
                image,
                share,
            };
            known.distrust(&suspects, go_on)?;
            if let Some(image) = &known.image {
                image.resume(&known.ledger);
            }
            known
        }
    };
    known.share.hold(known.ledger.held())?;
    let target = Target::new(spec, names, id, announced, known);
    Ok(Opened::Receiving(Box::new(target)))
}

/// The image that the target becomes; None for the bytes as they are sent.
fn image_for(spec: &TargetSpec, announced: &Announced) -> Result<Option<Image>> {
    if spec.care.container == Container::AsSent {
        return Ok(None);
    }
    if announced.mode != CopyMode::GuestVisible {
        let text = format!(
            "the target {:?} becomes a qcow2 image of what a guest sees, and a file was sent as it is; send it from an NBD export",
            spec.name
        );
        return Err(MoverError::new(Code::SourceInvalid, text).at_receiver());
    }
    if spec.care.place != Place::File {
        let text = format!("the device {:?} cannot become a qcow2 image", spec.name);
        return Err(MoverError::new(Code::InvalidArgument, text).at_receiver());
    }
    let layout = Layout::of(announced.identity.size)?;
    Ok(Some(Image::new(layout)))
}

impl Known {
    /// Takes over what did not change, if the earlier copy stands here.
    fn build_on(&mut self, revision: &Revision, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let note = |chunk, bitmap: &Bitmap| {
            if let Some(image) = &self.image {
                image.note(chunk, bitmap);
            }
        };
        let size = self.ledger.size();
        if revision.is_all(size) {
            return Ok(());
        }
        self.share.hold(rebase::most_chunks(revision))?;
        let unchanged = rebase::unchanged(&self.medium, size, revision, &note, go_on)?;
        // Otherwise it is a base like any other: compared with all of the source.
        let Some(ledger) = unchanged else {
            return Ok(());
        };
        let noted = self.journal.append(entry::all(&ledger));
        noted.map_err(|e| MoverError::target_io("cannot write a journal", &e))?;
        self.ledger = ledger;
        Ok(())
    }

    /// Takes back what the suspected segments do not hold.
    fn distrust(&mut self, suspects: &[usize], go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let expected = |segment| Expected::of(&self.ledger, segment);
        let Some(bad) = audit::failing(&self.medium, suspects, &expected, go_on) else {
            let text = "the session ended while what an earlier one placed was read back";
            return Err(MoverError::new(Code::SessionClosed, text).at_receiver());
        };
        if bad.is_empty() {
            return Ok(());
        }
        let noted = self.journal.forget(&bad);
        noted.map_err(|e| MoverError::target_io("cannot write a journal", &e))?;
        for segment in bad {
            self.ledger.forget(segment);
        }
        Ok(())
    }
}

/// The part of a file that is not there yet.
fn find_part(spec: &TargetSpec, tag: &str, size: u64, since: Option<Hash>) -> Result<Found> {
    let names = Names::open(&spec.root, &spec.name, tag)?;
    if let Some(found) = receipt::published(&names)? {
        // Killed between publishing and tidying up.
        names.remove(&names.journal)?;
        names.remove(&names.part)?;
        let receipt = &found.receipt;
        // What was never read is in no bitmap: nothing can be built on that.
        if since != Some(receipt.root) || !receipt.unreadable.is_empty() {
            found.check_untouched(&names, receipt::file_stamp(&names, &names.base)?)?;
            return Ok(Found::Published(found.receipt));
        }
        publish::reopen(&names)?;
    }
    publish::refuse_existing(&names)?;
    let lock = open_part(&names)?;
    // The lock is held: the name and the open file stay the same one.
    let Some(id) = receipt::file_id(&names, &names.part)? else {
        return Err(names.failed("cannot stat", &names.part, Errno::NOENT));
    };
    let stat = rustix::fs::fstat(&*lock);
    let sized = stat.is_ok_and(|stat| stat.st_size as u64 == size);
    let unmapped = |e| MoverError::target_io(&format!("cannot map {}", names.part), &e);
    let blank = is_blank(&lock, size).map_err(unmapped)?;
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::DIRECT;
    let direct = beneath::open(&names.dir, &names.part, flags, Mode::empty()).ok();
    let direct = direct.filter(|fd| rustix::fs::fstat(fd).is_ok_and(|s| s.st_ino == id.inode));
    let file = lock.try_clone().map_err(unmapped)?;
    Ok(Found::Open(Site {
        names,
        id,
        file,
        lock: Some(lock),
        direct: direct.map(File::from),
        blank,
        sized,
        is_device: false,
    }))
}

/// Opens or creates the part, locked; refuses what is not a plain file of ours.
pub fn open_part(names: &Names) -> Result<Locked> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK;
    for _ in 0..3 {
        let fd = naming::create(&names.dir, &names.part, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| match e {
                Errno::LOOP | Errno::XDEV => beneath::refused(&names.part, e),
                e => names.failed("cannot open", &names.part, e),
            })?;
        let failed = |e: Errno| names.failed("cannot stat", &names.part, e);
        let locked = Locked::take(File::from(fd))
            .map_err(|e| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        let Some(part) = locked else {
            let text = format!("another session writes the target {:?}", names.shown);
            return Err(MoverError::new(Code::TargetBusy, text).at_receiver());
        };
        let stat = rustix::fs::fstat(&*part).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink > 1 {
            let text = format!("{} is not a plain file with one name", names.part);
            return Err(MoverError::new(Code::TargetPath, text).at_receiver());
        }
        // The lock may have come when the last holder published or removed it.
        match rustix::fs::statat(&names.dir, &names.part, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) if named.st_ino == stat.st_ino && stat.st_nlink == 1 => {
                return Ok(part);
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    let text = format!("{} changes all the time", names.part);
    Err(MoverError::new(Code::TargetBusy, text).at_receiver())
}

/// Whether a part reads as zero when it is given this size. Where the word of the file
/// system about holes is not taken, only an empty one does.
fn is_blank(part: &File, size: u64) -> io::Result<bool> {
    if part.metadata()?.len() == 0 {
        return Ok(true);
    }
    if trust::doubt(part).is_some() {
        return Ok(false);
    }
    let data = Store::new(part.try_clone()?).next_data(0)?;
    Ok(data.is_none_or(|data| data >= size))
}
