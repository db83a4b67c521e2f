//! `cache list|add|remove`: the media of a node's cache group, while guests run.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::context::{Context, Failure, Outcome};
use super::output::{Column, Table, note, print_json};
use control::api::compute::{AddMedium, MediumState, MediumView, RemoveMedium};
use control::units::ByteSize;
use node::config::CacheMedium;

/// How long adding a medium may take: the directory of the largest there can be has 10 GB.
const ADD_TIME_MAX: Duration = Duration::from_secs(600);

pub(super) const EXAMPLES: &str = "\
Examples:
  virtman cache add /mnt/ssd/chunks=200G   keep chunks in this file, made if missing
  virtman cache add /dev/nvme1n1=1T        the same on a block device, which must be empty
  virtman cache list                       see what is cached where, what failed, and why
  virtman cache remove /mnt/ssd/chunks     use it no longer; the file stays as it is

A medium whose reads and writes fail, or bring wrong bytes, too often is not used any
more. Guests do not notice: what was on it is fetched again. Remove it, mend it, and add
it again. To give a medium another size, add another, remove the first and add it again.";

/// The media of a node's cache group.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List the media of all nodes, or with --node of one
    List,
    /// Use a file or block device of the node for cached chunks; those that are on it already are found again
    Add {
        /// The file, made if missing, or block device, and how much of it to use
        #[arg(value_name = "PATH=SIZE")]
        medium: CacheMedium,
    },
    /// Use a medium no longer; what was on it is fetched again when it is wanted, and the file is left as it is
    Remove {
        /// The file or block device, as `virtman cache list` shows it
        path: PathBuf,
    },
}

pub(super) async fn run(context: &Context, command: &CacheCommand) -> Outcome {
    match command {
        CacheCommand::List => list(context).await,
        CacheCommand::Add { medium } => {
            let request = AddMedium { path: absolute(&medium.path)?, size_bytes: medium.size_bytes };
            let node = context.node().await?.with_patience(ADD_TIME_MAX);
            let medium: MediumView = node.client.put("/v1/cache", &request).await?;
            if context.json() {
                print_json(&medium);
            } else {
                note(&format!(
                    "'{}' is used, with room for {}; {} of it are taken",
                    medium.path,
                    ByteSize(medium.capacity_bytes),
                    ByteSize(medium.resident_bytes)
                ));
            }
            Ok(())
        }
        CacheCommand::Remove { path } => {
            let request = RemoveMedium { path: absolute(path)? };
            let node = context.node().await?;
            let leaving: Option<MediumView> = node.client.post("/v1/cache/remove", &request).await?;
            let path = request.path.display();
            let sentence = match leaving {
                None => format!("'{path}' is not used any more; its file was left as it is"),
                Some(_) => format!(
                    "'{path}' is not used any more, but reads of it are still on their way: leave it where it is until 'virtman cache list' does not show it"
                ),
            };
            context.done("removed", &path, &sentence);
            Ok(())
        }
    }
}

/// The path as the node, whose working directory is another, has to be told it.
fn absolute(path: &PathBuf) -> Outcome<PathBuf> {
    std::path::absolute(path).map_err(|e| Failure::new(format!("'{}' is not a path: {e}", path.display())))
}

async fn list(context: &Context) -> Outcome {
    let media: Vec<MediumView> = context.ask_all("/v1/cache").await?;
    if context.json() {
        print_json(&media);
        return Ok(());
    }
    let mut table = Table::new([
        Column::Text("NODE"),
        Column::Text("MEDIUM"),
        Column::Number("SIZE"),
        Column::Number("CACHED"),
        Column::Text("STATE"),
        Column::Number("FAILURES"),
        Column::Text("REASON"),
    ]);
    for medium in media {
        table.row([
            medium.node.to_string(),
            medium.path,
            ByteSize(medium.size_bytes).to_string(),
            ByteSize(medium.resident_bytes).to_string(),
            match medium.state {
                MediumState::Healthy => "healthy",
                MediumState::Failed => "failed",
                MediumState::Leaving => "leaving",
            }
            .to_owned(),
            medium.failures.to_string(),
            medium.reason.unwrap_or_default(),
        ]);
    }
    table.print_or("Nothing is cached: no node has a medium. 'virtman cache add PATH=SIZE' adds one.");
    Ok(())
}
