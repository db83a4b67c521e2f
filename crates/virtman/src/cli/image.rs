//! `image add|list|show|remove|verify|tune|attach|detach`; `image profile` is in [`profile`].

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use futures_util::StreamExt;
use iscsi::initiator::{Address, AddressError};
use planner::Shaping;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ImageCommand;
use super::context::{Context, Failure, Outcome};
use super::export::{read_line, read_secret};
use super::output::{Column, Table, bytes_bar, print_json, say};
use super::profile;
use control::api::compute::{AddImage, ImageVerified, KeepImage, NodeImage, Progress};
use control::api::export::ChapSecret;
use control::api::volt::{ImageRecord, TuneImage};
use control::http::Client;
use control::units::{ByteSize, show_ms};
use node::remote_location;
use volt::config::shaping;

/// The secrets of an iSCSI target. None is given on the command line, where everybody can read it.
#[derive(Debug, Args)]
pub(crate) struct SecretArgs {
    /// File with the secret for an iSCSI target (CHAP), on one line: USER:SECRET, or SECRET if USER stands in the
    /// address; the environment variable VIRTMAN_CHAP has the same form
    #[arg(long, value_name = "FILE")]
    chap_file: Option<PathBuf>,
    /// File with what that target has to prove in turn: USER:SECRET
    #[arg(long, value_name = "FILE")]
    mutual_chap_file: Option<PathBuf>,
}

/// Environment variable with a secret for an iSCSI target.
const CHAP_VARIABLE: &str = "VIRTMAN_CHAP";

/// How the locations of logical units begin.
const ISCSI: &str = "iscsi://";

impl SecretArgs {
    /// What the node is to read, if it is a remote disk, and the secret that opens it.
    fn remote(&self, location: &str) -> Outcome<(PathBuf, Option<ChapSecret>)> {
        if location.starts_with(ISCSI) {
            return self.unit(location);
        }
        self.must_be_none(location)?;
        Ok((location.into(), None))
    }

    /// Only iSCSI has secrets.
    fn must_be_none(&self, location: &str) -> Outcome {
        if self.chap_file.is_none() && self.mutual_chap_file.is_none() {
            return Ok(());
        }
        Err(Failure::new(format!(
            "a secret was given, but '{location}' is not an iSCSI address: use iscsi://[USER@]HOST[:PORT]/TARGET/LUN"
        )))
    }

    /// The address of a logical unit, and what opens it.
    fn unit(&self, location: &str) -> Outcome<(PathBuf, Option<ChapSecret>)> {
        let address: Address = location.parse().map_err(|e: AddressError| Failure::new(e.to_string()))?;
        let text = match &self.chap_file {
            Some(file) => Some((file.display().to_string(), read_line(file)?)),
            None => std::env::var(CHAP_VARIABLE).ok().map(|text| (CHAP_VARIABLE.to_owned(), text)),
        };
        let secret = match (&address.user, text) {
            (None, None) => None,
            (Some(user), None) => {
                return Err(Failure::new(format!(
                    "there is no secret for '{user}': give it in a file with --chap-file, or in {CHAP_VARIABLE}"
                )));
            }
            (Some(user), Some((_, text))) => {
                let text = text.trim_end_matches(['\r', '\n']);
                let secret = text.strip_prefix(&format!("{user}:")).unwrap_or(text).to_owned();
                Some(ChapSecret { user: user.clone(), secret })
            }
            (None, Some((place, text))) => {
                Some(text.parse().map_err(|e: String| Failure::new(format!("{place}: {e}")))?)
            }
        };
        Ok((address.to_string().into(), secret))
    }
}

pub(super) async fn run(context: &Context, command: &ImageCommand) -> Outcome {
    match command {
        ImageCommand::Add { name, file, format, allow, copy, secrets } => {
            let node = context.node().await?;
            let (file, chap) = match remote_location(file) {
                Some(location) => secrets.remote(location)?,
                None => {
                    secrets.must_be_none(&file.display().to_string())?;
                    (absolute(file)?, None)
                }
            };
            let body = AddImage {
                file: file.clone(),
                chap,
                mutual_chap: secrets.mutual_chap_file.as_deref().map(read_secret).transpose()?,
                format: format.clone(),
                allow: allow.iter().map(|dir| absolute(dir)).collect::<Outcome<_>>()?,
                keep: if *copy { KeepImage::Copy } else { KeepImage::InPlace },
            };
            let path = format!("/v1/images/{name}");
            let what = format!("hashing {}", file.display());
            let image: NodeImage = follow(&node.client, &path, &body, what).await?;
            if context.json() {
                print_json(&image);
            } else {
                say(&format!("{name} {}", image.id));
            }
            Ok(())
        }
        ImageCommand::List => list(context).await,
        ImageCommand::Show { image } => show(context, image).await,
        ImageCommand::Remove { image, force } => {
            let node = context.node().await?;
            let query = if *force { "?force=true" } else { "" };
            node.client.delete::<()>(&format!("/v1/images/{image}{query}")).await?;
            context.done("removed", image, &format!("removed '{image}'"));
            Ok(())
        }
        ImageCommand::Verify { image } => {
            let node = context.node().await?;
            let path = format!("/v1/images/{image}/verify");
            let what = format!("verifying {image}");
            let verified: ImageVerified = follow(&node.client, &path, &(), what).await?;
            if context.json() {
                print_json(&verified);
            }
            if verified.wrong_chunks > 0 {
                return Err(Failure::new(format!(
                    "{} of {} chunks of '{image}' are not what they were when it was added, first at byte {}: its file was changed or is damaged; restore the file, or add it under another tag",
                    verified.wrong_chunks,
                    verified.chunks,
                    verified.wrong_offsets.first().copied().unwrap_or_default()
                )));
            }
            if !context.json() {
                say(&format!("{image}: all {} chunks are right", verified.chunks));
            }
            Ok(())
        }
        // Without numbers it is --auto, which the grammar sees to.
        ImageCommand::Tune { image, stripes, fan_out, auto: _ } => {
            let shaping = shaping(*fan_out, *stripes).map_err(|e| Failure::new(e.to_string()))?;
            let path = format!("/v1/images/{image}/shape");
            let record: ImageRecord = context.volt()?.put(&path, &TuneImage { shaping }).await?;
            if context.json() {
                print_json(&record);
            } else {
                say(&format!("{}: {}", record.name, shape_text(record.shaping)));
            }
            Ok(())
        }
        ImageCommand::Profile(command) => profile::run(context, command).await,
        ImageCommand::Attach { image, fill } => {
            let node = context.node().await?;
            let query = if *fill { "?fill=true" } else { "" };
            let image: NodeImage = node.client.put(&format!("/v1/attached/{image}{query}"), &()).await?;
            if context.json() {
                print_json(&image);
            } else {
                say(&image.export);
            }
            Ok(())
        }
        ImageCommand::Detach { image } => {
            let node = context.node().await?;
            node.client.delete::<()>(&format!("/v1/attached/{image}")).await?;
            context.done("detached", image, &format!("detached '{image}'"));
            Ok(())
        }
    }
}

async fn list(context: &Context) -> Outcome {
    if !context.named_node().is_empty() {
        return list_attached(context).await;
    }
    // A host without credentials for Volt still knows the images that its own node has attached.
    let images: Vec<ImageRecord> = match context.volt() {
        Ok(volt) => volt.get("/v1/images").await?,
        Err(_) => return list_attached(context).await,
    };
    if context.json() {
        print_json(&images);
        return Ok(());
    }
    let mut table = Table::new([
        Column::Text("IMAGE"),
        Column::Text("ID"),
        Column::Number("SIZE"),
        Column::Number("DATA"),
        Column::Text("ORIGINS"),
    ]);
    for image in images {
        table.row([
            image.name.to_string(),
            image.id.short(),
            ByteSize(image.size_bytes).to_string(),
            data_bytes(image.chunks - image.zero_chunks).to_string(),
            join(&image.origins),
        ]);
    }
    table.print_or("No images. 'virtman image add NAME FILE' adds one.");
    Ok(())
}

async fn list_attached(context: &Context) -> Outcome {
    let images: Vec<NodeImage> = context.node().await?.client.get("/v1/images").await?;
    if context.json() {
        print_json(&images);
        return Ok(());
    }
    let mut table = Table::new([
        Column::Text("IMAGE"),
        Column::Text("ID"),
        Column::Number("SIZE"),
        Column::Number("DATA"),
        Column::Text("ROLE"),
        Column::Number("FILLED"),
        Column::Number("VMS"),
        Column::Number("DETACHES"),
    ]);
    for image in images {
        table.row([
            join(&image.names),
            image.id.short(),
            ByteSize(image.size_bytes).to_string(),
            data_bytes(image.chunks - image.zero_chunks).to_string(),
            image.role,
            image.fill.map_or("-".to_owned(), |fill| format!("{} %", fill.resident * 100 / fill.chunks)),
            image.vms.to_string(),
            image.detaches_in_ms.map_or("-".to_owned(), |ms| format!("in {}", show_ms(ms))),
        ]);
    }
    table.print_or("This node has no image attached.");
    Ok(())
}

async fn show(context: &Context, image: &str) -> Outcome {
    let record: ImageRecord = context.volt()?.get(&format!("/v1/images/{image}")).await?;
    if context.json() {
        print_json(&record);
        return Ok(());
    }
    say(&format!("name         {}", record.name));
    say(&format!("id           {}", record.id));
    say(&format!("size         {} ({} bytes)", ByteSize(record.size_bytes), record.size_bytes));
    let data_chunks = record.chunks - record.zero_chunks;
    say(&format!("data chunks  {data_chunks} ({})", data_bytes(data_chunks)));
    say(&format!("zero chunks  {}", record.zero_chunks));
    say(&format!("origins      {}", join(&record.origins)));
    say(&format!("shape        {}", shape_text(record.shaping)));
    Ok(())
}

/// How an image gets its shape, in words.
fn shape_text(shaping: Option<Shaping>) -> String {
    match shaping {
        None => "as Volt was told for all images".to_owned(),
        Some(Shaping::Auto) => "chosen by the number of nodes".to_owned(),
        Some(Shaping::Fixed(shape)) => super::show::shape(shape),
    }
}

/// Asks for something long, and shows how far it is.
pub(super) async fn follow<T: DeserializeOwned + Send + 'static>(
    client: &Client,
    path: &str,
    body: &impl Serialize,
    what: String,
) -> Outcome<T> {
    let bar = bytes_bar(what);
    let mut lines = client.post_lines::<Progress<T>>(path, body).await?;
    while let Some(line) = lines.next().await {
        match line? {
            Progress::Bytes { done, total } => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Progress::Done { result } => {
                bar.finish_and_clear();
                return Ok(result);
            }
            Progress::Failed { message } => {
                bar.finish_and_clear();
                return Err(Failure::new(message));
            }
        }
    }
    bar.finish_and_clear();
    Err(Failure::new("the node ended before it was done: see its log, then try again"))
}

/// The path of a file that is there, as a node on this host can open it.
pub(super) fn absolute(path: &Path) -> Outcome<PathBuf> {
    fs::canonicalize(path).map_err(|e| Failure::new(format!("cannot open {}: {e}", path.display())))
}

fn data_bytes(chunks: u64) -> ByteSize {
    ByteSize(chunks * block::limits::CHUNK_BYTES as u64)
}

fn join<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
