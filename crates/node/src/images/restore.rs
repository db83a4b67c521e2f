//! Attaches again what was attached when the daemon ended.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use block::ImageId;
use tokio::time::Instant;

use super::{AttachedRecord, Images, decode_root, record_file};
use crate::state;
use control::api::profile::ProfileOffer;

/// Attaches again what was attached when the daemon ended. What cannot be is said and left out.
pub(crate) fn restore(images: &Images) -> io::Result<()> {
    image::sweep(images.local.dir())?;
    let mut files = state::sweep(&images.layout.attached())?;
    // An image comes after the one that it was derived from, which may be derived itself.
    while !files.is_empty() {
        let (ready, waiting): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|file| !waits_for_base(images, file));
        let stuck = ready.is_empty();
        for file in if stuck { &waiting } else { &ready } {
            if let Err(reason) = restore_one(images, file) {
                images.unrestored.fetch_add(1, Ordering::Relaxed);
                tracing::error!(file = %file.display(), reason, "image_not_restored");
            }
        }
        files = if stuck { Vec::new() } else { waiting };
    }
    // A record counts even if it is damaged.
    images.local.remove_unrecorded(|id| !state::is_absent(&record_file(&images.layout, id)))?;
    images.forget_unused_remotes()
}

/// Whether the image of this record was derived from one that is not attached yet.
fn waits_for_base(images: &Images, file: &Path) -> bool {
    let id = file.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
    let base = id.and_then(|id: ImageId| images.local.base_of(&id));
    base.is_some_and(|base| images.by_id(&base).is_none())
}

fn restore_one(images: &Images, file: &Path) -> Result<(), String> {
    let record: AttachedRecord = state::read_record(file)?;
    let root = decode_root(&record.root_page)?;
    let attached =
        images.make(root, record.kind, record.placement, ProfileOffer::default(), Instant::now())?;
    for name in record.names {
        images.add_name(&attached, name)?;
    }
    if record.prefetch {
        attached.prefetch();
    }
    {
        let mut state = attached.state();
        (state.transfer_names, state.retention) = (record.transfer_names, record.retention);
    }
    images.insert(attached);
    Ok(())
}
