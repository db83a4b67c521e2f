//! `image profile show|record|clear|export|import`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Subcommand;
use image::{BootProfile, PROFILE_BYTES_MAX};

use super::context::{Context, Failure, Outcome};
use super::output::{Column, Table, note, print, print_json, say};
use control::api::now_unix_ms;
use control::api::profile::{NewProfile, ProfileFile, ProfileView, Recording};
use control::units::ByteSize;

/// What guests read first, fetched ahead of them. Profiles are recorded from the first boots by themselves.
#[derive(Debug, Subcommand)]
pub(crate) enum ProfileCommand {
    /// Show an image's boot profile and the boots that it was recorded from
    Show {
        /// Name with tag, or id
        image: String,
    },
    /// Record the next boots anew; the profile stays in use until the first of them is recorded
    Record {
        /// Name with tag, or id
        image: String,
    },
    /// Forget an image's boot profile; none is recorded until `record` asks for it
    Clear {
        /// Name with tag, or id
        image: String,
    },
    /// Write an image's boot profile to a file
    Export {
        /// Name with tag, or id
        image: String,
        /// The file; replaced if it is there
        file: PathBuf,
    },
    /// Use the boot profile in a file, which must be one of the very same image
    Import {
        /// Name with tag, or id
        image: String,
        /// The file
        file: PathBuf,
    },
}

pub(super) async fn run(context: &Context, command: &ProfileCommand) -> Outcome {
    let volt = context.volt()?;
    match command {
        ProfileCommand::Show { image } => {
            let view: ProfileView = volt.get(&path(image)).await?;
            show(context, &view);
        }
        ProfileCommand::Record { image } => {
            let view: ProfileView = volt.post(&format!("{}/record", path(image)), &()).await?;
            changed(context, &view, &format!("the next boots of '{}' are recorded", view.name));
        }
        ProfileCommand::Clear { image } => {
            let view: ProfileView = volt.delete(&path(image)).await?;
            changed(context, &view, &format!("cleared the boot profile of '{}'", view.name));
        }
        ProfileCommand::Export { image, file } => {
            let view: ProfileView = volt.get(&path(image)).await?;
            let profile = view.profile.as_ref().ok_or_else(|| {
                Failure::new(format!(
                    "'{}' has no boot profile yet: {}",
                    view.name,
                    what_next(view.recording)
                ))
            })?;
            fs::write(file, profile.file.0.encode())
                .map_err(|e| Failure::new(format!("cannot write {}: {e}", file.display())))?;
            changed(
                context,
                &view,
                &format!("wrote a boot profile of {} chunks to {}", profile.chunks, file.display()),
            );
        }
        ProfileCommand::Import { image, file } => {
            let request = NewProfile { file: ProfileFile(Arc::new(read(file)?)) };
            let chunks = request.file.0.chunks().len();
            let view: ProfileView = volt.put(&path(image), &request).await?;
            changed(context, &view, &format!("'{}' has a boot profile of {chunks} chunks", view.name));
        }
    }
    Ok(())
}

fn path(image: &str) -> String {
    format!("/v1/images/{image}/profile")
}

fn read(file: &Path) -> Outcome<BootProfile> {
    let failed = |why: String| Failure::new(format!("{}: {why}", file.display()));
    // Told by its length before it is read: somebody may have named the image itself.
    let length = fs::metadata(file).map_err(|e| failed(e.to_string()))?.len();
    if length > PROFILE_BYTES_MAX as u64 {
        return Err(failed(format!(
            "this is not a boot profile: it has {length} bytes, and those have {PROFILE_BYTES_MAX} at most"
        )));
    }
    let bytes = fs::read(file).map_err(|e| failed(e.to_string()))?;
    BootProfile::decode(&bytes).map_err(|e| failed(e.to_string()))
}

/// Tells what was done: the profile as it is now in JSON, else a sentence.
fn changed(context: &Context, view: &ProfileView, sentence: &str) {
    if context.json() { print_json(view) } else { note(sentence) }
}

fn show(context: &Context, view: &ProfileView) {
    if context.json() {
        return print_json(view);
    }
    say(&format!("image      {}  {}", view.name, view.image.short()));
    match &view.profile {
        None => say(&format!("profile    none; {}", what_next(view.recording))),
        Some(profile) => {
            say(&format!("chunks     {} ({})", profile.chunks, ByteSize(profile.bytes)));
            say(&format!("first      chunk {}", profile.first_chunk));
            say(&format!("last       chunk {}", profile.last_chunk));
            let source = if view.records.is_empty() { "a file" } else { "the records below" };
            say(&format!("made from  {source}"));
        }
    }
    let recording = match view.recording {
        Recording::On => "the next boots are recorded",
        Recording::Off => "off",
    };
    say(&format!("recording  {recording}"));
    if view.records.is_empty() {
        return;
    }
    let mut table = Table::new([Column::Text("NODE"), Column::Number("CHUNKS"), Column::Text("RECORDED")]);
    let now = now_unix_ms();
    for record in &view.records {
        let ago = now.saturating_sub(record.recorded_unix_ms);
        table.row([record.node.to_string(), record.chunks.to_string(), format!("{} ago", age(ago))]);
    }
    say("");
    print(&table.render());
}

fn what_next(recording: Recording) -> &'static str {
    match recording {
        Recording::On => "it is recorded when the first VMs boot",
        Recording::Off => "'virtman image profile record' has the next boots recorded",
    }
}

/// How long ago, in the largest unit of which there is one whole.
pub(super) fn age(ms: u64) -> String {
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1000, "s")];
    units
        .into_iter()
        .find(|(unit_ms, _)| ms >= *unit_ms)
        .map_or_else(|| "less than 1 s".to_owned(), |(unit_ms, unit)| format!("{} {unit}", ms / unit_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_its_largest_unit() {
        let ages = [999, 1000, 119_000, 120_000, 7_200_000, 200_000_000].map(age);
        assert_eq!(ages, ["less than 1 s", "1 s", "1 min", "2 min", "2 h", "2 d"]);
    }
}
