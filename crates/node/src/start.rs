//! The order in which a node comes back: each phase is a value that only the one before gives.
//!
//! Images come first, since layers stand on them; then VMs, whose disks are made of layers; once all records are counted
//! that name layers, those that none names are removed. Exports are of what is there then, and only then is the node
//! ready.

use std::io;
use std::sync::Arc;

use image::OpenRemote;

use crate::exports::Exports;
use crate::images::Images;
use crate::images::restore::restore as restore_images;
use crate::layers::{self, LayerId, Layers};
use crate::migration::source::OutgoingVms;
use crate::migration::target::IncomingVms;
use crate::restore;
use crate::state::Layout;
use crate::vms::Vms;
use crate::vms::guests::Guests;

/// Whether all records could be made durable and read that may name layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Records {
    Complete,
    /// Some may name layers that nobody knows of.
    Incomplete,
}

/// It is known which layers there are; nothing is open.
pub(crate) struct Started {
    layers: Arc<Layers>,
    records: Records,
}

/// The images are attached again, and the layers are counted that they were derived from.
pub(crate) struct WithImages(Started);

/// The VMs are there, with the guests that outlived the daemon; layers that nobody needs are gone.
pub(crate) struct WithVms;

/// All is as it was when the daemon ended.
pub(crate) struct Ready;

impl Started {
    /// Makes the records durable as the last daemon left them, and reads which layers there are. `images` makes the
    /// node's images, with what opens the layers that images were derived from.
    pub(crate) fn open(
        layout: &Layout,
        images: impl FnOnce(Arc<dyn OpenRemote>) -> Images,
    ) -> io::Result<Started> {
        let records = match layout.sync_records() {
            Ok(()) => Records::Complete,
            Err(error) => {
                tracing::error!(dir = %layout.dir().display(), %error, "records_not_synced");
                Records::Incomplete
            }
        };
        Ok(Started { layers: Layers::open(layout.layers(), images)?, records })
    }

    /// The layers, and by way of them the images.
    pub(crate) fn layers(&self) -> &Arc<Layers> {
        &self.layers
    }

    /// Attaches the images again.
    pub(crate) fn restore_images(self) -> io::Result<WithImages> {
        let images = self.layers.images();
        restore_images(images)?;
        let locations = images.local.derived_from();
        let derived_from = locations.and_then(|locations| {
            locations.iter().map(|location| layers::layer_at(location)).collect::<Result<Vec<LayerId>, _>>()
        });
        match derived_from {
            Ok(derived_from) => {
                self.layers.add_refs(derived_from);
                Ok(WithImages(self))
            }
            Err(reason) => {
                tracing::error!(reason, "derived_image_damaged: what it was derived from is not known");
                Ok(WithImages(Started { records: Records::Incomplete, ..self }))
            }
        }
    }
}

impl WithImages {
    /// Opens the disks of VMs, adopts their guests, and removes the layers that no record names.
    pub(crate) async fn restore_vms(
        self,
        vms: &Vms,
        guests: &Guests,
        outgoing: &OutgoingVms,
        incoming: &IncomingVms,
    ) -> io::Result<WithVms> {
        let WithImages(Started { layers, records }) = self;
        let found = restore::restore(vms, guests, outgoing).await?;
        layers.sweep(records == Records::Complete && found.complete);
        for coming in found.incoming {
            let name = coming.record.name.clone();
            if let Err(reason) = incoming.restore(coming) {
                tracing::error!(vm = %name, reason, "vm_not_restored: it was coming");
            }
        }
        Ok(WithVms)
    }
}

impl WithVms {
    /// Exports again what was exported.
    pub(crate) fn restore_exports(self, exports: &Exports) -> io::Result<Ready> {
        exports.restore()?;
        Ok(Ready)
    }
}

impl Ready {
    /// Says so to whoever started the daemon.
    pub(crate) fn announce(self) {
        control::daemon::ready();
    }
}
