//! The images' boot profiles: kept beside the catalog, merged from the records of first boots, and handed out.
//!
//! The boots of an image's VMs are recorded until there are [enough](KeptProfile); each record that comes makes
//! a new merged profile, and the nodes that have the image attached are told. An administrator may ask for fresh
//! records, take a profile over from a file, or clear it.
//!
//! Consistency: changes are one at a time, and are told in the order in which they were made. Durability: a change
//! is on disk before anybody is told. What is handed out is kept in memory too, since every attach asks for it.

pub(crate) mod routes;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use block::ImageId;

use super::catalog::{Catalog, CatalogError};
use super::kept_profile::KeptProfile;
use control::api::profile::ProfileOffer;

/// The boot profiles of all images.
pub(crate) struct Profiles {
    catalog: Arc<Catalog>,
    offers: RwLock<HashMap<ImageId, ProfileOffer>>,
    /// Held while a profile is changed and told.
    changing: Mutex<()>,
}

impl Profiles {
    /// Reads what is kept.
    pub(crate) fn open(catalog: Arc<Catalog>) -> Result<Profiles, CatalogError> {
        let offers = catalog.profiles()?.into_iter().map(|(image, kept)| (image, kept.offer())).collect();
        Ok(Profiles { catalog, offers: RwLock::new(offers), changing: Mutex::new(()) })
    }

    /// What a node that attaches the image is told.
    pub(crate) fn offer(&self, image: &ImageId) -> ProfileOffer {
        let offers = self.offers.read().unwrap_or_else(PoisonError::into_inner);
        offers.get(image).cloned().unwrap_or_else(|| KeptProfile::default().offer())
    }

    /// All that is kept of an image's profile.
    pub(crate) fn kept(&self, image: &ImageId) -> Result<KeptProfile, CatalogError> {
        Ok(self.catalog.profile(image)?.unwrap_or_default())
    }

    /// Changes an image's profile, and calls `tell` if nodes have to know.
    fn change<T>(
        &self,
        image: &ImageId,
        change: impl FnOnce(&mut KeptProfile) -> T,
        tell: impl FnOnce(ProfileOffer),
    ) -> Result<T, CatalogError> {
        let _one_at_a_time = self.changing();
        let mut kept = self.kept(image)?;
        let old = kept.clone();
        let changed = change(&mut kept);
        if kept != old {
            self.catalog.keep_profile(image, &kept)?;
            let offer = kept.offer();
            if offer != old.offer() {
                self.offers.write().unwrap_or_else(PoisonError::into_inner).insert(*image, offer.clone());
                tell(offer);
            }
        }
        Ok(changed)
    }

    /// Forgets the profile of an image that has no name any more.
    pub(crate) fn forget(&self, image: &ImageId) -> Result<(), CatalogError> {
        let _one_at_a_time = self.changing();
        self.catalog.forget_profile(image)?;
        self.offers.write().unwrap_or_else(PoisonError::into_inner).remove(image);
        Ok(())
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kept_profile::tests::{file, image};
    use control::api::profile::Recording;

    #[test]
    fn nodes_are_told_of_each_change_once_and_all_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.redb");
        let open = || Profiles::open(Arc::new(Catalog::open(&catalog).unwrap())).unwrap();
        let mut told = Vec::new();
        let profiles = open();
        assert_eq!(profiles.offer(&image()), ProfileOffer { file: None, recording: Recording::On });
        for _ in 0..2 {
            profiles.change(&image(), |kept| kept.import(file(&[4])), |offer| told.push(offer)).unwrap();
        }
        let offer = ProfileOffer { file: Some(file(&[4])), recording: Recording::Off };
        assert_eq!(told, std::slice::from_ref(&offer));
        drop(profiles);

        let profiles = open();
        assert_eq!(profiles.offer(&image()), offer);
        profiles.forget(&image()).unwrap();
        assert_eq!(profiles.kept(&image()).unwrap(), KeptProfile::default());
        assert_eq!(profiles.offer(&image()), KeptProfile::default().offer());
    }
}
