//! What Volt must not forget: images by name, their boot profiles, nodes that joined, unused join tokens.
//!
//! Durability: every change is one redb transaction, on disk when the call returns. Consistency: rules
//! that span records (a token is used once, a name keeps its id) are checked inside the transaction.
//! The hierarchy is not here: it is rebuilt from what nodes report.

use std::path::Path;
use std::time::SystemTime;

use block::{ImageId, ImageName, NodeName};
use planner::Shaping;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::kept_profile::KeptProfile;
use control::api::unix_ms;
use control::api::volt::{ImageKind, ImageRecord};
use identity::{CERTIFICATE_LIFETIME, Grant, JoinRefusal, SecretHash};

const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Boot profiles, by the image's id: all names of an image have one.
const PROFILES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("profiles");
const NODES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("nodes");
/// Nodes that were removed, with the time in milliseconds since the UNIX epoch.
const REMOVED: TableDefinition<'_, &str, u64> = TableDefinition::new("removed");
const TOKENS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("tokens");

/// Unused tokens that may exist at a time: a bound on what a careless script can pile up.
const TOKENS_MAX: u64 = 100_000;

/// The durable store.
pub(crate) struct Catalog {
    db: Database,
}

/// A node that joined.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JoinedNode {
    /// When it joined last.
    pub(crate) joined_unix_ms: u64,
    /// What it last said of itself, for display while it is away.
    pub(crate) address: String,
    pub(crate) location: String,
    pub(crate) version: String,
    /// Whether it sent wrong bytes and was not pardoned yet.
    pub(crate) quarantined: bool,
}

/// What a join was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joined {
    /// Nobody of this name had been removed.
    New,
    /// A removed name came back.
    Again,
}

/// Why a change of the catalog was refused. The variants are different HTTP answers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogError {
    /// The name is taken by another image.
    #[error("the name '{name}' belongs to image {id}")]
    NameTaken { name: ImageName, id: String },
    /// The same bytes are known as an image of another kind.
    #[error("image '{name}' has the same bytes and is of kind {kind}")]
    OtherKind { name: ImageName, kind: ImageKind },
    /// No image of this name or id.
    #[error("there is no image '{0}' in the catalog")]
    NoImage(String),
    /// No node of this name has joined.
    #[error("no node '{0}' has joined")]
    NoNode(NodeName),
    /// Too many unused tokens.
    #[error("{TOKENS_MAX} join tokens are unused: use some, or wait until they expire")]
    TooManyTokens,
    /// The file cannot be read or written.
    #[error("the catalog's file failed: {0}")]
    Storage(String),
}

/// redb has one error type per step; for us they are one: the file failed.
macro_rules! storage_errors {
    ($($error:ty),*) => {
        $(impl From<$error> for CatalogError {
            fn from(error: $error) -> Self {
                CatalogError::Storage(error.to_string())
            }
        })*
    };
}
storage_errors!(
    DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    serde_json::Error
);

impl Catalog {
    /// Opens the catalog, making an empty one if there is none.
    pub(crate) fn open(file: &Path) -> Result<Catalog, CatalogError> {
        let db = Database::create(file).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => CatalogError::Storage(
                "another 'virtman volt' uses it: stop that one first, or use another --home".to_owned(),
            ),
            other => other.into(),
        })?;
        let txn = db.begin_write()?;
        txn.open_table(IMAGES)?;
        txn.open_table(PROFILES)?;
        txn.open_table(NODES)?;
        txn.open_table(REMOVED)?;
        txn.open_table(TOKENS)?;
        txn.commit()?;
        Ok(Catalog { db })
    }

    /// All images, by name.
    pub(crate) fn images(&self) -> Result<Vec<ImageRecord>, CatalogError> {
        let txn = self.db.begin_read()?;
        let table = txn.open_table(IMAGES)?;
        table.iter()?.map(|entry| Ok(serde_json::from_slice(entry?.1.value())?)).collect()
    }

    /// The image with this name, or with this id under whatever name comes first.
    pub(crate) fn image(&self, name_or_id: &str) -> Result<ImageRecord, CatalogError> {
        let not_found = || CatalogError::NoImage(name_or_id.to_owned());
        if let Ok(id) = name_or_id.parse::<ImageId>() {
            return self.images()?.into_iter().find(|image| image.id == id).ok_or_else(not_found);
        }
        let name: ImageName = name_or_id.parse().map_err(|_| not_found())?;
        let txn = self.db.begin_read()?;
        get(&txn.open_table(IMAGES)?, name.as_str())?.ok_or_else(not_found)
    }

    /// Gives an image a name and notes that `origin` holds it. A name keeps its id until removed.
    pub(crate) fn add_image(
        &self,
        image: &ImageRecord,
        origin: &NodeName,
    ) -> Result<ImageRecord, CatalogError> {
        let txn = self.db.begin_write()?;
        let record = {
            let mut table = txn.open_table(IMAGES)?;
            let others = records_of(&table, &image.id)?;
            if let Some(other) = others.iter().find(|other| other.kind != image.kind) {
                return Err(CatalogError::OtherKind { name: other.name.clone(), kind: other.kind });
            }
            let mut record = match get::<ImageRecord>(&table, image.name.as_str())? {
                Some(old) if old.id != image.id => {
                    return Err(CatalogError::NameTaken { name: old.name, id: old.id.to_string() });
                }
                Some(old) => old,
                None => {
                    let other = others.into_iter().next();
                    ImageRecord { shaping: other.and_then(|other| other.shaping), ..image.clone() }
                }
            };
            if !record.origins.contains(origin) {
                record.origins.push(origin.clone());
                record.origins.sort();
            }
            table.insert(image.name.as_str(), serde_json::to_vec(&record)?.as_slice())?;
            record
        };
        commit(txn)?;
        Ok(record)
    }

    /// Notes how an image's hierarchy gets its shape, under all of its names.
    pub(crate) fn tune_image(&self, name_or_id: &str, shaping: Shaping) -> Result<ImageRecord, CatalogError> {
        let tuned = ImageRecord { shaping: Some(shaping), ..self.image(name_or_id)? };
        let txn = self.db.begin_write()?;
        {
            let mut table = txn.open_table(IMAGES)?;
            for record in records_of(&table, &tuned.id)? {
                let record = ImageRecord { shaping: tuned.shaping, ..record };
                table.insert(record.name.as_str(), serde_json::to_vec(&record)?.as_slice())?;
            }
        }
        commit(txn)?;
        Ok(tuned)
    }

    /// Takes a name away. The bytes stay where they are.
    pub(crate) fn remove_image(&self, name: &ImageName) -> Result<ImageRecord, CatalogError> {
        let txn = self.db.begin_write()?;
        let record = {
            let mut table = txn.open_table(IMAGES)?;
            let record = get::<ImageRecord>(&table, name.as_str())?
                .ok_or_else(|| CatalogError::NoImage(name.to_string()))?;
            table.remove(name.as_str())?;
            record
        };
        commit(txn)?;
        Ok(record)
    }

    /// All boot profiles.
    pub(crate) fn profiles(&self) -> Result<Vec<(ImageId, KeptProfile)>, CatalogError> {
        let txn = self.db.begin_read()?;
        let mut profiles = Vec::new();
        for entry in txn.open_table(PROFILES)?.iter()? {
            let (image, profile) = entry?;
            if let Ok(image) = image.value().parse() {
                profiles.push((image, serde_json::from_slice(profile.value())?));
            }
        }
        Ok(profiles)
    }

    /// What is kept of an image's boot profile.
    pub(crate) fn profile(&self, image: &ImageId) -> Result<Option<KeptProfile>, CatalogError> {
        let txn = self.db.begin_read()?;
        get(&txn.open_table(PROFILES)?, &image.to_string())
    }

    /// Keeps this of an image's boot profile from now on.
    pub(crate) fn keep_profile(&self, image: &ImageId, profile: &KeptProfile) -> Result<(), CatalogError> {
        let record = serde_json::to_vec(profile)?;
        let txn = self.db.begin_write()?;
        txn.open_table(PROFILES)?.insert(image.to_string().as_str(), record.as_slice())?;
        commit(txn)
    }

    /// Forgets an image's boot profile.
    pub(crate) fn forget_profile(&self, image: &ImageId) -> Result<(), CatalogError> {
        let txn = self.db.begin_write()?;
        txn.open_table(PROFILES)?.remove(image.to_string().as_str())?;
        commit(txn)
    }

    /// Notes a token that may be used once until it expires; forgets expired ones.
    pub(crate) fn add_token(&self, grant: &Grant, now: SystemTime) -> Result<(), CatalogError> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let txn = self.db.begin_write()?;
        {
            let mut table = txn.open_table(TOKENS)?;
            table.retain(|_, value| {
                serde_json::from_slice::<Grant>(value).is_ok_and(|other| other.expires_unix_seconds > now)
            })?;
            if redb::ReadableTableMetadata::len(&table)? >= TOKENS_MAX {
                return Err(CatalogError::TooManyTokens);
            }
            let record = serde_json::to_vec(grant)?;
            table.insert(grant.secret_hash.as_bytes().as_slice(), record.as_slice())?;
        }
        commit(txn)?;
        Ok(())
    }

    /// Takes a node in that shows a token's secret. A name that was removed is so no longer.
    pub(crate) fn join(
        &self,
        secret: &SecretHash,
        node: &NodeName,
        now: SystemTime,
    ) -> Result<Result<Joined, JoinRefusal>, CatalogError> {
        let txn = self.db.begin_write()?;
        let joined = {
            let mut tokens = txn.open_table(TOKENS)?;
            let grant = tokens
                .remove(secret.as_bytes().as_slice())?
                .map(|value| serde_json::from_slice::<Grant>(value.value()))
                .transpose()?;
            // A refusal leaves the transaction uncommitted, and so the token unused.
            let Some(grant) = grant else { return Ok(Err(JoinRefusal::UnknownToken)) };
            if let Err(refusal) = grant.admits(node, now) {
                return Ok(Err(refusal));
            }
            let mut nodes = txn.open_table(NODES)?;
            if grant.node.is_none() && nodes.get(node.as_str())?.is_some() {
                return Ok(Err(JoinRefusal::NameTaken(node.clone())));
            }
            let record = JoinedNode { joined_unix_ms: unix_ms(now), ..JoinedNode::default() };
            nodes.insert(node.as_str(), serde_json::to_vec(&record)?.as_slice())?;
            match txn.open_table(REMOVED)?.remove(node.as_str())? {
                Some(_) => Joined::Again,
                None => Joined::New,
            }
        };
        commit(txn)?;
        Ok(Ok(joined))
    }

    /// All nodes that joined and were not removed.
    pub(crate) fn nodes(&self) -> Result<Vec<(NodeName, JoinedNode)>, CatalogError> {
        let txn = self.db.begin_read()?;
        let table = txn.open_table(NODES)?;
        let mut nodes = Vec::new();
        for entry in table.iter()? {
            let (name, record) = entry?;
            if let Ok(name) = name.value().parse() {
                nodes.push((name, serde_json::from_slice(record.value())?));
            }
        }
        Ok(nodes)
    }

    /// Whether a node of this name joined and was not removed.
    pub(crate) fn has_node(&self, node: &NodeName) -> Result<bool, CatalogError> {
        let txn = self.db.begin_read()?;
        Ok(txn.open_table(NODES)?.get(node.as_str())?.is_some())
    }

    /// Changes a node's record. Writes only if it changed.
    pub(crate) fn update_node(
        &self,
        node: &NodeName,
        change: impl FnOnce(&mut JoinedNode),
    ) -> Result<(), CatalogError> {
        let txn = self.db.begin_write()?;
        {
            let mut table = txn.open_table(NODES)?;
            let old = get::<JoinedNode>(&table, node.as_str())?
                .ok_or_else(|| CatalogError::NoNode(node.clone()))?;
            let mut record = old.clone();
            change(&mut record);
            if record == old {
                return Ok(());
            }
            table.insert(node.as_str(), serde_json::to_vec(&record)?.as_slice())?;
        }
        commit(txn)?;
        Ok(())
    }

    /// Removes a node from the cluster: its certificate is refused from now on. Forgets the removals of
    /// nodes whose certificates have expired since, which bounds what there is to remember.
    pub(crate) fn remove_node(&self, node: &NodeName, now: SystemTime) -> Result<(), CatalogError> {
        let now_ms = unix_ms(now);
        let valid_ms = u64::try_from(CERTIFICATE_LIFETIME.as_millis()).unwrap_or(u64::MAX);
        let txn = self.db.begin_write()?;
        if txn.open_table(NODES)?.remove(node.as_str())?.is_none() {
            return Err(CatalogError::NoNode(node.clone()));
        }
        {
            let mut removed = txn.open_table(REMOVED)?;
            removed.retain(|_, at_ms| now_ms < at_ms.saturating_add(valid_ms))?;
            removed.insert(node.as_str(), now_ms)?;
        }
        commit(txn)?;
        Ok(())
    }

    /// The nodes that were removed and whose certificates may not have expired yet.
    pub(crate) fn removed_nodes(&self) -> Result<Vec<NodeName>, CatalogError> {
        let txn = self.db.begin_read()?;
        let table = txn.open_table(REMOVED)?;
        let mut nodes = Vec::new();
        for entry in table.iter()? {
            nodes.extend(entry?.0.value().parse::<NodeName>());
        }
        Ok(nodes)
    }
}

/// Waiting for the disk must not hold up the other tasks of this worker thread.
fn commit(txn: WriteTransaction) -> Result<(), CatalogError> {
    Ok(tokio::task::block_in_place(|| txn.commit())?)
}

/// An image under all of its names.
fn records_of(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    id: &ImageId,
) -> Result<Vec<ImageRecord>, CatalogError> {
    let mut records = Vec::new();
    for entry in table.iter()? {
        let record: ImageRecord = serde_json::from_slice(entry?.1.value())?;
        records.extend((record.id == *id).then_some(record));
    }
    Ok(records)
}

fn get<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<T>, CatalogError> {
    let Some(value) = table.get(key)? else { return Ok(None) };
    Ok(Some(serde_json::from_slice(value.value())?))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use planner::Shape;

    use super::*;
    use identity::{Fingerprint, Token};

    fn catalog() -> (tempfile::TempDir, Catalog) {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        (dir, catalog)
    }

    fn record(name: &str, root: &[u8]) -> ImageRecord {
        ImageRecord {
            name: name.parse().unwrap(),
            id: ImageId::of_root_page(root),
            kind: ImageKind::Disk,
            root_page: String::new(),
            size_bytes: 1,
            chunks: 1,
            zero_chunks: 0,
            added_unix_ms: 0,
            origins: vec![],
            shaping: None,
        }
    }

    #[test]
    fn the_same_bytes_are_of_one_kind_and_records_of_before_are_disks() {
        let (_dir, catalog) = catalog();
        let origin: NodeName = "o".parse().unwrap();
        let memory = ImageRecord { kind: ImageKind::Memory, ..record("b:1", b"a") };
        assert_eq!(catalog.add_image(&record("a:1", b"a"), &origin).unwrap().kind, ImageKind::Disk);
        let refused = catalog.add_image(&memory, &origin).unwrap_err();
        assert!(matches!(&refused, CatalogError::OtherKind { kind: ImageKind::Disk, .. }), "{refused}");
        let mut old = serde_json::to_value(record("c:1", b"c")).unwrap();
        old.as_object_mut().unwrap().remove("kind");
        assert_eq!(serde_json::from_value::<ImageRecord>(old).unwrap().kind, ImageKind::Disk);
    }

    #[test]
    fn a_name_keeps_its_id_and_gains_origins() {
        let (dir, catalog) = catalog();
        let [a, b] = ["a", "b"].map(|n| n.parse::<NodeName>().unwrap());
        catalog.add_image(&record("debian:12", b"one"), &a).unwrap();
        let both = catalog.add_image(&record("debian:12", b"one"), &b).unwrap();
        assert_eq!(both.origins, [a.clone(), b]);
        let taken = catalog.add_image(&record("debian:12", b"two"), &a);
        assert!(matches!(taken, Err(CatalogError::NameTaken { .. })), "{taken:?}");

        drop(catalog);
        let again = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        assert_eq!(again.images().unwrap(), vec![both.clone()], "the catalog survives a restart");
        assert_eq!(again.image(&both.id.to_string()).unwrap(), both);
        again.remove_image(&both.name).unwrap();
        assert!(matches!(again.image("debian:12"), Err(CatalogError::NoImage(_))));
    }

    #[test]
    fn a_shape_is_kept_under_all_names_of_an_image_and_survives_a_restart() {
        let (dir, catalog) = catalog();
        let a = "a".parse::<NodeName>().unwrap();
        for (name, root) in [("debian:12", b"one"), ("debian:latest", b"one"), ("other:1", b"two")] {
            catalog.add_image(&record(name, root), &a).unwrap();
        }
        let shaping = Shaping::Fixed(Shape::new(4, 2).unwrap());
        catalog.tune_image("debian:12", shaping).unwrap();
        catalog.add_image(&record("debian:new", b"one"), &a).unwrap();
        assert!(matches!(catalog.tune_image("none:1", shaping), Err(CatalogError::NoImage(_))));
        drop(catalog);
        let again = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        let kept: Vec<_> = again.images().unwrap().into_iter().map(|image| image.shaping).collect();
        assert_eq!(kept, [Some(shaping), Some(shaping), Some(shaping), None]);
    }

    fn token() -> Token {
        Token::new("volt.example:7410", Fingerprint::of(b"a certificate")).unwrap()
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_token_is_used_once_and_not_after_it_expired() {
        let (_dir, catalog) = catalog();
        let [a, b] = ["a", "b"].map(|n| n.parse::<NodeName>().unwrap());
        let (first, second) = (token(), token());
        catalog.add_token(&first.grant(at(100), None), at(0)).unwrap();
        assert_eq!(catalog.join(&first.secret().hash(), &a, at(50)).unwrap(), Ok(Joined::New));
        let again = catalog.join(&first.secret().hash(), &b, at(50)).unwrap();
        assert_eq!(again, Err(JoinRefusal::UnknownToken));
        catalog.add_token(&second.grant(at(100), None), at(0)).unwrap();
        let late = catalog.join(&second.secret().hash(), &b, at(100)).unwrap();
        assert_eq!(late, Err(JoinRefusal::Expired));
    }

    #[test]
    fn a_taken_node_name_is_refused_and_leaves_the_token_usable() {
        let (_dir, catalog) = catalog();
        let [a, b] = ["a", "b"].map(|n| n.parse::<NodeName>().unwrap());
        let (first, second, replacing) = (token(), token(), token());
        for (token, node) in [(&first, None), (&second, None), (&replacing, Some(a.clone()))] {
            catalog.add_token(&token.grant(at(100), node), at(0)).unwrap();
        }
        let join = |token: &Token, node| catalog.join(&token.secret().hash(), node, at(1)).unwrap();
        assert_eq!(join(&first, &a), Ok(Joined::New));
        assert_eq!(join(&second, &a), Err(JoinRefusal::NameTaken(a.clone())));
        assert_eq!(join(&second, &b), Ok(Joined::New));
        assert_eq!(join(&replacing, &a), Ok(Joined::New), "a token for the very name replaces the node");
        catalog.remove_node(&a, at(2)).unwrap();
        assert_eq!(catalog.nodes().unwrap().len(), 1);
    }

    #[test]
    fn a_removed_name_is_remembered_until_it_joins_again_or_its_certificate_has_expired() {
        let (dir, catalog) = catalog();
        let [a, b] = ["a", "b"].map(|n| n.parse::<NodeName>().unwrap());
        let join = |catalog: &Catalog, node: &NodeName| {
            let token = token();
            catalog.add_token(&token.grant(at(100), None), at(0)).unwrap();
            catalog.join(&token.secret().hash(), node, at(1)).unwrap()
        };
        assert_eq!((join(&catalog, &a), join(&catalog, &b)), (Ok(Joined::New), Ok(Joined::New)));
        catalog.remove_node(&a, at(2)).unwrap();
        assert!(matches!(catalog.remove_node(&a, at(3)), Err(CatalogError::NoNode(_))));
        assert!(!catalog.has_node(&a).unwrap());

        drop(catalog);
        let catalog = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        assert_eq!(catalog.removed_nodes().unwrap(), std::slice::from_ref(&a), "removals survive a restart");
        assert_eq!(join(&catalog, &a), Ok(Joined::Again));
        assert_eq!(catalog.removed_nodes().unwrap(), []);

        catalog.remove_node(&a, at(4)).unwrap();
        catalog.remove_node(&b, at(4) + CERTIFICATE_LIFETIME).unwrap();
        assert_eq!(catalog.removed_nodes().unwrap(), [b], "nobody has a valid certificate of a any more");
    }
}
