//! Whom a command talks to, and how it fails.
//!
//! Commands about one node go to its UNIX socket, or with `--node` to wherever that node is. Commands
//! about the cluster go to Volt: by its own UNIX socket on its host, else with the administrator's
//! credentials in HOME/admin, which also open every node.

use control::refusal::Code;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use block::{NodeName, VmName};
use serde::de::DeserializeOwned;

use super::Global;
use super::output::{note, print_json};
use control::VOLT_ADDRESS_FILE;
use control::api::compute::Vm;
use control::api::volt::{NodeRecord, NodeState, VoltStatus};
use control::http::{Client, ClientError, Target};
use identity::tls::ConnectError;
use identity::{Credentials, Identity, Principal};

/// A command failed: what is wrong, with which value, and what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
}

/// How commands end.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into() }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        let remedy = match &error {
            ClientError::Connect(ConnectError::Unreachable { .. }) => {
                "; start 'virtman volt' or 'virtman compute' there"
            }
            _ => "",
        };
        Failure::new(format!("{error}{remedy}"))
    }
}

impl From<identity::IdentityError> for Failure {
    fn from(error: identity::IdentityError) -> Failure {
        Failure::new(error.to_string())
    }
}

/// A node that a command talks to.
pub(super) struct NodeClient {
    /// Its name; not known of a local node that was never asked.
    pub(super) name: Option<NodeName>,
    pub(super) client: Client,
}

impl NodeClient {
    /// The same node, asked with more time for each answer.
    pub(super) fn with_patience(&self, limit: Duration) -> NodeClient {
        let client = Client::new(self.client.target().clone()).with_answer_time_max(limit);
        NodeClient { name: self.name.clone(), client }
    }
}

/// The ways to Volt and the nodes.
pub(super) struct Context {
    global: Global,
}

impl Context {
    pub(super) fn new(global: &Global) -> Context {
        Context { global: global.clone() }
    }

    pub(super) fn json(&self) -> bool {
        self.global.json
    }

    /// Says that something was done to `name`: `{"what": "name"}` as JSON, else a sentence.
    pub(super) fn done(&self, what: &str, name: &impl ToString, sentence: &str) {
        if self.json() {
            print_json(&BTreeMap::from([(what, name.to_string())]));
        } else {
            note(sentence);
        }
    }

    /// The node that `--node` names: one or none.
    pub(super) fn named_node(&self) -> &[NodeName] {
        self.global.node.as_slice()
    }

    fn admin_dir(&self) -> PathBuf {
        self.global.home.join("admin")
    }

    fn volt_socket(&self) -> PathBuf {
        self.global.home.join("volt").join("api.sock")
    }

    fn node_socket(&self) -> PathBuf {
        self.global.node_dir().join("api.sock")
    }

    /// The administrator's credentials, if this host has them.
    fn credentials(&self) -> Outcome<Option<Arc<Credentials>>> {
        let dir = self.admin_dir();
        if !dir.exists() {
            return Ok(None);
        }
        Ok(Some(Credentials::new(Identity::load(&dir)?)))
    }

    /// Volt.
    pub(super) fn volt(&self) -> Outcome<Client> {
        if let Some(credentials) = self.credentials()? {
            let file = self.admin_dir().join(VOLT_ADDRESS_FILE);
            let address = fs::read_to_string(&file).map_err(|e| {
                Failure::new(format!("cannot read Volt's address from {}: {e}", file.display()))
            })?;
            let address = address.trim().to_owned();
            return Ok(Client::new(Target::Tls { address, principal: Principal::Volt, credentials }));
        }
        let socket = self.volt_socket();
        if socket.exists() {
            return Ok(Client::new(Target::Unix(socket)));
        }
        Err(Failure::new(format!(
            "this needs an administrator's credentials, and {} does not exist: run it on Volt's host, or copy that directory from there (or name another with --home)",
            self.admin_dir().display()
        )))
    }

    /// Volt's view of the cluster.
    pub(super) async fn cluster(&self) -> Outcome<VoltStatus> {
        Ok(self.volt()?.get("/v1/status").await?)
    }

    /// A node of the cluster, wherever it is.
    pub(super) fn remote(&self, record: &NodeRecord) -> Outcome<NodeClient> {
        let credentials = self.credentials()?.ok_or_else(|| {
            Failure::new(format!(
                "talking to node {} needs an administrator's credentials, and {} does not exist: copy it from Volt's host",
                record.node,
                self.admin_dir().display()
            ))
        })?;
        let principal = Principal::Node(record.node.clone());
        let client = Client::new(Target::Tls { address: record.address.clone(), principal, credentials });
        Ok(NodeClient { name: Some(record.node.clone()), client })
    }

    /// The node that the command is for: `--node`, or the one on this host.
    pub(super) async fn node(&self) -> Outcome<NodeClient> {
        if let Some(name) = &self.global.node {
            let status = self.cluster().await?;
            return self.remote(find_node(&status, name)?);
        }
        let socket = self.node_socket();
        if !socket.exists() {
            return Err(Failure::new(format!(
                "no node runs here: there is no {}; start one with 'virtman compute', or name one with --node or --dir",
                socket.display()
            )));
        }
        Ok(NodeClient { name: None, client: Client::new(Target::Unix(socket)) })
    }

    /// The nodes that the command is about: `--node`, all that are up, or the one on this host if it has
    /// no credentials for the others.
    pub(super) async fn nodes(&self) -> Outcome<Vec<NodeClient>> {
        let local_only = self.global.dir.is_some() || !self.admin_dir().exists();
        if self.global.node.is_some() || local_only {
            return Ok(vec![self.node().await?]);
        }
        let status = self.cluster().await?;
        status.nodes.iter().filter(|n| n.state != NodeState::Down).map(|n| self.remote(n)).collect()
    }

    /// What all nodes that the command is about have at `path`, together. Nodes that do not answer are left out with
    /// a word, unless none answers at all.
    pub(super) async fn ask_all<T: DeserializeOwned>(&self, path: &str) -> Outcome<Vec<T>> {
        let nodes = self.nodes().await?;
        let mut all = Vec::new();
        let mut silent = Vec::new();
        for node in &nodes {
            match node.client.get::<Vec<T>>(path).await {
                Ok(mut some) => all.append(&mut some),
                Err(error) => silent.push((&node.name, error)),
            }
        }
        if silent.len() == nodes.len()
            && let Some((_, error)) = silent.pop()
        {
            return Err(error.into());
        }
        for (name, error) in silent {
            let name = name.as_ref().map_or("on this host", NodeName::as_str);
            note(&format!("warning: node {name} does not answer: {error}"));
        }
        Ok(all)
    }

    /// Where a VM is. With the same name on several nodes, `--node` has to say which is meant. A node that does not
    /// answer matters only if no other has the VM.
    pub(super) async fn find_vm(&self, name: &VmName) -> Outcome<(NodeClient, Vm)> {
        let mut found: Vec<(NodeClient, Vm)> = Vec::new();
        let mut silent = None;
        for node in self.nodes().await? {
            match node.client.get::<Vm>(&format!("/v1/vms/{name}")).await {
                Ok(vm) => found.push((node, vm)),
                Err(ClientError::Refused(refusal)) if refusal.code == Code::NoSuchVm => {}
                Err(error) => silent = Some(error),
            }
        }
        if let Some(error) = silent.filter(|_| found.is_empty()) {
            return Err(error.into());
        }
        if found.len() > 1 {
            let nodes: Vec<String> = found.iter().map(|(_, vm)| vm.node.to_string()).collect();
            return Err(Failure::new(format!(
                "there is a VM '{name}' on each of {}: say which with --node",
                nodes.join(", ")
            )));
        }
        found.pop().ok_or_else(|| {
            Failure::new(format!("there is no VM '{name}'; 'virtman list' shows those that there are"))
        })
    }
}

/// The node of this name, which must be up.
pub(super) fn find_node<'a>(status: &'a VoltStatus, name: &NodeName) -> Outcome<&'a NodeRecord> {
    let known = || status.nodes.iter().map(|n| n.node.to_string()).collect::<Vec<_>>().join(", ");
    let record = status.nodes.iter().find(|n| n.node == *name).ok_or_else(|| {
        Failure::new(format!("there is no node '{name}' in the cluster; it has: {}", known()))
    })?;
    if record.state == NodeState::Down {
        return Err(Failure::new(format!(
            "node '{name}' is down: start 'virtman compute' on it, or choose another"
        )));
    }
    Ok(record)
}
