//! One profile from the records of several boots.

use std::collections::HashMap;

use block::{ChunkIndex, ImageId};

use super::{BootProfile, PROFILE_CHUNKS_MAX, ProfileError};

impl BootProfile {
    /// What the boots of `image` have in common: the chunks that at least half of the records name, in the order
    /// of the median of their places. Guests read much alike but not the same, and a median is not moved by one
    /// boot that was disturbed. Records of other images do not count.
    ///
    /// # Errors
    /// [`ProfileError::Empty`] if no chunk is common to half of the records.
    pub fn merged<'a>(
        image: ImageId,
        records: impl IntoIterator<Item = &'a BootProfile>,
    ) -> Result<BootProfile, ProfileError> {
        let mut places: HashMap<ChunkIndex, Vec<usize>> = HashMap::new();
        let mut count = 0;
        for record in records.into_iter().filter(|record| record.image() == image) {
            count += 1;
            for (place, &chunk) in record.chunks().iter().enumerate() {
                places.entry(chunk).or_default().push(place);
            }
        }
        let common = places.into_iter().filter(|(_, places)| 2 * places.len() >= count);
        let mut ranked: Vec<(usize, ChunkIndex)> =
            common.map(|(chunk, places)| (median_doubled(places), chunk)).collect();
        ranked.sort_unstable();
        let chunks = ranked.into_iter().take(PROFILE_CHUNKS_MAX).map(|(_, chunk)| chunk).collect();
        BootProfile::new(image, chunks)
    }
}

/// Twice the median, so that it is a whole number; there is at least one place.
fn median_doubled(mut places: Vec<usize>) -> usize {
    places.sort_unstable();
    places[(places.len() - 1) / 2] + places[places.len() / 2]
}
