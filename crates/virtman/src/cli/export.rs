//! `export list|add|remove`, and who may open what.

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::context::{Context, Failure, NodeClient, Outcome};
use super::output::{Column, Table, note, print_json, say};
use control::api::export::{ChapSecret, ExportAccess, ExportName, ExportProtocol, ExportView, IscsiAccess};

/// Permissions of a file that others than its owner have, too.
const SHARED_MODE: u32 = 0o077;

/// Ways to VM disks and images. Each can be opened over NBD on its node; over iSCSI if it is exported so.
#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// List the exports of all nodes
    List,
    /// Let initiators open a VM's disk, or read an image, over iSCSI; repeat it to change who may
    Add {
        /// The VM, or the image with its tag, such as debian:12
        name: ExportName,
        #[command(flatten)]
        access: AccessArgs,
    },
    /// Export a VM's disk or an image over iSCSI no longer; its sessions end
    Remove {
        /// The VM, or the image with its tag
        name: ExportName,
    },
}

/// Protocols that a disk is exported over only when that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// iSCSI, on the portals that the node was given with `--iscsi-listen`
    Iscsi,
}

/// Who may open an export.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("access").multiple(true))]
pub(crate) struct AccessArgs {
    /// Only this initiator may open it over iSCSI, by its name (repeatable)
    #[arg(long, group = "access", value_name = "IQN")]
    initiator: Vec<String>,
    /// Initiators prove with CHAP that they know the secret in this file: one line USER:SECRET
    #[arg(long, group = "access", value_name = "FILE")]
    chap_file: Option<PathBuf>,
    /// The node proves in turn that it knows the secret in this file
    #[arg(long, requires = "chap_file", value_name = "FILE")]
    mutual_chap_file: Option<PathBuf>,
    /// Whoever reaches the node may open it over iSCSI, without a secret
    #[arg(long, group = "access", conflicts_with_all = ["initiator", "chap_file"])]
    anyone: bool,
}

impl AccessArgs {
    /// Whether nothing was said.
    pub(super) fn is_empty(&self) -> bool {
        self.initiator.is_empty() && self.chap_file.is_none() && !self.anyone
    }

    /// What the node is told, secrets included.
    pub(super) fn access(&self) -> Outcome<IscsiAccess> {
        let secret = |file: &Option<PathBuf>| file.as_deref().map(read_secret).transpose();
        Ok(IscsiAccess {
            initiators: self.initiator.clone(),
            anyone: self.anyone,
            chap: secret(&self.chap_file)?,
            mutual_chap: secret(&self.mutual_chap_file)?,
        })
    }
}

/// Reads a file of one line `USER:SECRET`.
pub(super) fn read_secret(file: &Path) -> Outcome<ChapSecret> {
    read_line(file)?.parse().map_err(|e| unreadable(file, e))
}

fn unreadable(file: &Path, why: impl Display) -> Failure {
    Failure::new(format!("no secret can be read from {}: {why}", file.display()))
}

/// Reads a file with a secret in it, and says so if others can, too.
pub(super) fn read_line(file: &Path) -> Outcome<String> {
    let text = fs::read_to_string(file).map_err(|e| unreadable(file, e))?;
    let shared = fs::metadata(file).is_ok_and(|file| file.permissions().mode() & SHARED_MODE != 0);
    if shared {
        let file = file.display();
        note(&format!("warning: others can read the secret in {file}: 'chmod 600 {file}' ends that"));
    }
    Ok(text)
}

pub(super) async fn run(context: &Context, command: &ExportCommand) -> Outcome {
    match command {
        ExportCommand::List => list(context).await,
        ExportCommand::Add { name, access } => {
            let node = context.node().await?;
            let path = format!("/v1/exports/{name}");
            let export: ExportView = node.client.put(&path, &ExportAccess::Iscsi(access.access()?)).await?;
            if context.json() {
                print_json(&export);
            } else {
                export.addresses.iter().for_each(|address| say(address));
            }
            Ok(())
        }
        ExportCommand::Remove { name } => {
            let node = context.node().await?;
            node.client.delete::<()>(&format!("/v1/exports/{name}")).await?;
            context.done("removed", name, &format!("'{name}' is no longer exported over iSCSI"));
            Ok(())
        }
    }
}

/// Prints where a disk can be opened over iSCSI.
pub(super) async fn say_addresses(node: &NodeClient, name: &ExportName) -> Outcome {
    let exports: Vec<ExportView> = node.client.get("/v1/exports").await?;
    let of_name = exports.into_iter().filter(|export| export.name == *name && export.target.is_some());
    of_name.flat_map(|export| export.addresses).for_each(|address| say(&address));
    Ok(())
}

async fn list(context: &Context) -> Outcome {
    let exports: Vec<ExportView> = context.ask_all("/v1/exports").await?;
    if context.json() {
        print_json(&exports);
        return Ok(());
    }
    let mut table = Table::new([
        Column::Text("NAME"),
        Column::Text("NODE"),
        Column::Text("ACCESS"),
        Column::Text("INITIATORS"),
        Column::Text("SECRETS"),
        Column::Number("SESSIONS"),
        Column::Text("ADDRESS"),
    ]);
    for export in exports {
        let initiators = match (export.protocol, export.initiators.is_empty()) {
            (ExportProtocol::Iscsi, true) => "any".to_owned(),
            (ExportProtocol::Iscsi, false) => export.initiators.join(", "),
            (ExportProtocol::Nbd, _) => "-".to_owned(),
        };
        for (portal, address) in export.addresses.iter().enumerate() {
            let sessions = export.sessions.iter().filter(|session| session.portal == portal).count();
            table.row([
                export.name.to_string(),
                export.node.to_string(),
                if export.read_only { "read-only" } else { "read-write" }.to_owned(),
                initiators.clone(),
                export.authentication.clone(),
                if export.target.is_some() { sessions.to_string() } else { "-".to_owned() },
                address.clone(),
            ]);
        }
    }
    table.print_or("Nothing is exported: no node has an image attached or a VM.");
    Ok(())
}
