//! Layers on disk: a directory each, with an overlay and a record of what the layer stands on.
//!
//! Crash: a layer that was being made may be torn, its record too; nothing names it yet, so that is not damage. A layer
//! goes with its record first, so that what is left of it is swept away at the next start. All of this blocks its thread.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::Disk;
use store::Overlay;

use super::LayerId;
use super::forest::{Damaged, Forest};
use super::layer::LayerRecord;
use crate::state;

const RECORD: &str = "layer.json";

/// The directory of a node's layers.
pub(super) struct LayerFiles {
    dir: PathBuf,
}

impl LayerFiles {
    pub(super) fn new(dir: PathBuf) -> LayerFiles {
        LayerFiles { dir }
    }

    /// Reads which layers there are. Those that cannot be read are among the damaged ones.
    pub(super) fn read(&self) -> io::Result<Forest> {
        let mut forest = Forest::default();
        let mut records = Vec::new();
        for dir in state::sweep(&self.dir)? {
            let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let id = name.parse::<LayerId>();
            let read = id.clone().and_then(|id| Ok((id, state::read_record(&dir.join(RECORD))?)));
            match read {
                Ok(record) => records.push(record),
                Err(_) if state::is_absent(&dir.join(RECORD)) => fs::remove_dir_all(&dir)?,
                Err(reason) => {
                    forest.damaged.push(Damaged { dir, is_needed: id.is_err(), id: id.ok(), reason });
                }
            }
        }
        // Twice, since a child may come before its parent.
        for (id, record) in &records {
            forest.insert(*id, LayerRecord::clone(record), 0);
        }
        for (id, record) in &records {
            if let Some(parent) = record.parent.layer()
                && let Some(parent) = forest.layers.get_mut(&parent)
            {
                parent.children.insert(*id);
            }
        }
        Ok(forest)
    }

    /// Makes an empty layer, durably. What it does not hold is read from `base`.
    pub(super) fn create(
        &self,
        id: LayerId,
        record: &LayerRecord,
        size_bytes: u64,
        base: Arc<dyn Disk>,
    ) -> Result<Overlay, String> {
        let dir = self.dir_of(id);
        let failed = |e: io::Error| format!("{}: {e}", dir.display());
        fs::create_dir(&dir).map_err(failed)?;
        // Nobody names the layer yet, so that all of it is written before any of it is synced.
        let record = state::write_first_record(&dir.join(RECORD), record).map_err(failed)?;
        let overlay = Overlay::create(&dir, size_bytes, base).map_err(|e| e.to_string())?;
        record.sync_all().map_err(failed)?;
        let overlay = overlay.sync().map_err(|e| e.to_string())?;
        state::sync_dir(&dir).and_then(|()| state::sync_dir(&self.dir)).map_err(failed)?;
        Ok(overlay)
    }

    /// Opens a layer on `base`.
    pub(super) fn open(&self, id: LayerId, base: Arc<dyn Disk>) -> Result<Overlay, String> {
        Overlay::open(&self.dir_of(id), base).map_err(|e| e.to_string())
    }

    /// Replaces what is remembered of a layer.
    pub(super) fn save(&self, id: LayerId, record: &LayerRecord) -> Result<(), String> {
        let file = self.dir_of(id).join(RECORD);
        state::write_record(&file, record).map_err(|e| format!("cannot write {}: {e}", file.display()))
    }

    /// Removes layers. One that cannot be removed is named in the log, and is removed at the next start.
    pub(super) fn remove(&self, layers: &[LayerId]) {
        for id in layers {
            let dir = self.dir_of(*id);
            if let Err(error) = remove_layer(&dir)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(dir = %dir.display(), %error, "layer_not_removed");
            }
        }
    }

    fn dir_of(&self, id: LayerId) -> PathBuf {
        self.dir.join(id.to_string())
    }
}

fn remove_layer(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(RECORD)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::remove_dir_all(dir),
    }
}
