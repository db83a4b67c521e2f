//! `status` and `tree`.

use block::ImageName;
use serde::Serialize;

use super::context::{Context, Outcome};
use super::output::{Column, Table, print, print_json, say};
use control::api::compute::NodeStatus;
use control::api::volt::{ImageRecord, NodeRecord, NodeState, TreeNode, TreeView};
use control::units::ByteSize;

/// `status` as JSON.
#[derive(Serialize)]
struct Status {
    nodes: Vec<NodeLine>,
    images: Vec<ImageRecord>,
}

#[derive(Serialize)]
struct NodeLine {
    #[serde(flatten)]
    record: NodeRecord,
    /// What the node says of itself, if it answers.
    now: Option<NodeStatus>,
}

pub(super) async fn status(context: &Context) -> Outcome {
    let cluster = match context.volt() {
        Ok(volt) => volt.get::<control::api::volt::VoltStatus>("/v1/status").await?,
        Err(no_volt) => {
            // A host that knows no Volt still has a node to show.
            let node = context.node().await.map_err(|_| no_volt)?;
            let status: NodeStatus = node.client.get("/v1/status").await?;
            return show_node(context, &status);
        }
    };
    let mut nodes = Vec::new();
    for record in cluster.nodes {
        let now = match record.state {
            NodeState::Down => None,
            NodeState::Up | NodeState::Quarantined => match context.remote(&record) {
                Ok(node) => node.client.get("/v1/status").await.ok(),
                Err(_) => None,
            },
        };
        nodes.push(NodeLine { record, now });
    }
    let status = Status { nodes, images: cluster.images };
    if context.json() {
        print_json(&status);
        return Ok(());
    }
    node_table(&status.nodes).print_or("No nodes. 'virtman volt token' prints what a host needs to join.");
    say("");
    let mut images = Table::new([Column::Text("IMAGE"), Column::Number("SIZE"), Column::Text("ORIGINS")]);
    for image in &status.images {
        let origins: Vec<String> = image.origins.iter().map(ToString::to_string).collect();
        images.row([image.name.to_string(), ByteSize(image.size_bytes).to_string(), origins.join(", ")]);
    }
    images.print_or("No images. 'virtman image add NAME FILE' adds one.");
    Ok(())
}

fn node_table(nodes: &[NodeLine]) -> Table {
    let mut table = Table::new([
        Column::Text("NODE"),
        Column::Text("STATE"),
        Column::Text("ADDRESS"),
        Column::Text("LOCATION"),
        Column::Number("VMS"),
        Column::Number("RUNNING"),
        Column::Number("CACHED"),
        Column::Number("FETCHED"),
        Column::Number("SENT"),
        Column::Number("MEMORY"),
    ]);
    for NodeLine { record, now } in nodes {
        let of = |show: fn(&NodeStatus) -> String| now.as_ref().map_or_else(|| "-".to_owned(), show);
        table.row([
            record.node.to_string(),
            match record.state {
                NodeState::Up if now.is_none() => "silent",
                NodeState::Up => "up",
                NodeState::Down => "down",
                NodeState::Quarantined => "quarantined",
            }
            .to_owned(),
            record.address.clone(),
            record.location.clone(),
            of(|s| s.vms.to_string()),
            of(|s| s.running.to_string()),
            of(|s| ByteSize(s.cache.resident_bytes).to_string()),
            of(|s| ByteSize(s.links.received_wire_bytes).to_string()),
            of(|s| ByteSize(s.links.sent_wire_bytes).to_string()),
            of(|s| ByteSize(s.memory_bytes).to_string()),
        ]);
    }
    table
}

fn show_node(context: &Context, status: &NodeStatus) -> Outcome {
    if context.json() {
        print_json(status);
        return Ok(());
    }
    let volt = if status.volt_connected { "connected" } else { "not connected; what is attached goes on" };
    say(&format!("node     {} at {}", status.node, status.address));
    say(&format!("volt     {volt}"));
    say(&format!("vms      {} ({} running)", status.vms, status.running));
    let (resident, capacity) = (status.cache.resident_bytes, status.cache.capacity_bytes);
    let failed = match status.cache.failed_media {
        0 => "",
        _ => "; media have failed, see 'virtman cache list'",
    };
    say(&format!("cache    {} of {}{failed}", ByteSize(resident), ByteSize(capacity)));
    say(&format!("fetched  {}", ByteSize(status.links.received_wire_bytes)));
    say(&format!("sent     {}", ByteSize(status.links.sent_wire_bytes)));
    say(&format!("memory   {}", ByteSize(status.memory_bytes)));
    Ok(())
}

pub(super) async fn tree(context: &Context, image: Option<&ImageName>) -> Outcome {
    let volt = context.volt()?;
    let names: Vec<String> = match image {
        Some(name) => vec![name.to_string()],
        None => {
            volt.get::<Vec<ImageRecord>>("/v1/images").await?.iter().map(|i| i.name.to_string()).collect()
        }
    };
    let mut trees: Vec<TreeView> = Vec::new();
    for name in names {
        trees.push(volt.get(&format!("/v1/images/{name}/tree")).await?);
    }
    if context.json() {
        print_json(&trees);
        return Ok(());
    }
    if trees.is_empty() {
        say("No images. 'virtman image add NAME FILE' adds one.");
    }
    for tree in &trees {
        print(&render(tree));
    }
    Ok(())
}

/// A hierarchy as an indented tree, stripe by stripe.
fn render(view: &TreeView) -> String {
    let mut text = format!("{}  {}", view.image.name, view.image.id.short());
    if let Some(told) = view.shape {
        text.push_str(&format!("  {}", shape(told)));
    }
    text.push('\n');
    if view.stripes.iter().all(Vec::is_empty) {
        text.push_str("  no node has it attached\n");
    }
    for (number, stripe) in view.stripes.iter().enumerate() {
        if view.stripes.len() > 1 {
            text.push_str(&format!("stripe {number}\n"));
        }
        for (index, at) in stripe.iter().enumerate() {
            text.push_str(&format!("{}{} ({})\n", branch(stripe, index), at.node, role(at)));
        }
    }
    text
}

/// A shape in words.
pub(super) fn shape(shape: planner::Shape) -> String {
    let plural = if shape.stripes() == 1 { "" } else { "s" };
    format!("{} stripe{plural}, fan-out {}", shape.stripes(), shape.fan_out())
}

fn role(at: &TreeNode) -> &'static str {
    match at.role {
        planner::Role::Origin => "origin",
        planner::Role::Relay => "relay",
    }
}

/// The lines to the left of a node: a corner if it is its parent's last child, and a stroke for each
/// ancestor that has more children to come.
fn branch(stripe: &[TreeNode], index: usize) -> String {
    let depth = stripe[index].depth;
    let more_below = |level: u32| {
        stripe[index + 1..].iter().take_while(|later| later.depth >= level).any(|later| later.depth == level)
    };
    (1..=depth)
        .map(|level| match (level == depth, more_below(level)) {
            (true, true) => "├─ ",
            (true, false) => "└─ ",
            (false, true) => "│  ",
            (false, false) => "   ",
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_shows_who_hangs_below_whom() {
        let at = |node: &str, depth| TreeNode {
            node: node.parse().unwrap(),
            parent: None,
            depth,
            role: planner::Role::Relay,
        };
        let stripe = [at("o", 0), at("a", 1), at("c", 2), at("b", 1), at("d", 2)];
        let lines: Vec<String> = (0..5).map(|i| branch(&stripe, i) + stripe[i].node.as_str()).collect();
        assert_eq!(lines, ["o", "├─ a", "│  └─ c", "└─ b", "   └─ d"]);
    }
}
