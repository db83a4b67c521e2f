//! Boot profiles in both APIs.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::{ImageId, ImageName, NodeName};
use image::BootProfile;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// A boot profile, in JSON the base64 of its file form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileFile(pub Arc<BootProfile>);

impl Serialize for ProfileFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(self.0.encode()))
    }
}

impl<'de> Deserialize<'de> for ProfileFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        let bytes = BASE64.decode(text).map_err(Error::custom)?;
        BootProfile::decode(&bytes).map(|profile| ProfileFile(Arc::new(profile))).map_err(Error::custom)
    }
}

/// Whether nodes record the boots of an image's VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recording {
    /// They do not.
    #[default]
    Off,
    /// They do.
    On,
}

/// What Volt tells a node about an image's boot profile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProfileOffer {
    /// The profile, base64, if there is one.
    #[schema(value_type = Option<String>)]
    pub file: Option<ProfileFile>,
    /// Whether the next boots are to be recorded.
    pub recording: Recording,
}

/// A boot profile to be taken over: a node's record of one boot, or an administrator's import.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NewProfile {
    /// The profile, base64. It names its image.
    #[schema(value_type = String)]
    pub file: ProfileFile,
}

/// What Volt has of an image's boot profile.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ProfileView {
    /// The image, by the name or id that was asked for.
    #[schema(value_type = String)]
    pub name: ImageName,
    /// Its id.
    #[schema(value_type = String)]
    pub image: ImageId,
    /// Whether the next boots are recorded.
    pub recording: Recording,
    /// The profile that nodes stream ahead of guests, if there is one.
    pub profile: Option<ProfileSummary>,
    /// The records that it was merged from, the oldest first; none if it was imported.
    pub records: Vec<RecordSummary>,
}

/// A boot profile in numbers, and itself.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ProfileSummary {
    /// How many chunks it names.
    pub chunks: u64,
    /// How many bytes they cover.
    pub bytes: u64,
    /// The chunk that guests touch first.
    pub first_chunk: u64,
    /// The chunk that they touch last.
    pub last_chunk: u64,
    /// The profile itself, base64.
    #[schema(value_type = String)]
    pub file: ProfileFile,
}

/// The record of one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecordSummary {
    /// The node that the guest booted on.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// When Volt got it.
    pub recorded_unix_ms: u64,
    /// How many chunks the guest touched.
    pub chunks: u64,
}

/// How far a node is with an image's boot profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeProfile {
    /// Chunks that the profile names.
    pub chunks: u64,
    /// Those of them that are here: fetched, found in the cache, or all zero.
    pub resident: u64,
    /// Whether all are here.
    pub complete: bool,
    /// Time until the last of them was here, since the image was attached or, if that was later, the profile
    /// came; absent until it is complete, and on an origin, which has all of them from the start.
    pub elapsed_ms: Option<u64>,
}

impl ProfileSummary {
    /// Describes a profile.
    pub fn of(file: &ProfileFile) -> ProfileSummary {
        let chunks = file.0.chunks();
        let index = |chunk: Option<&block::ChunkIndex>| chunk.map_or(0, |chunk| chunk.0);
        ProfileSummary {
            chunks: chunks.len() as u64,
            bytes: (chunks.len() * block::limits::CHUNK_BYTES) as u64,
            first_chunk: index(chunks.first()),
            last_chunk: index(chunks.last()),
            file: file.clone(),
        }
    }
}
