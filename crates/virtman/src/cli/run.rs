//! From the parsed command line to what it does, and how its end is told.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use super::context::{Context, Failure, Outcome};
use super::output::{note, print, print_json, say};
use super::{
    Cli, Command, VoltCommand, boot, cache, clone, details, export, image, migrate, show, snapshot, vm,
};
use control::api::volt::{NewToken, TokenIssued};
use identity::AdminName;
use node::Destroy;
use volt::init::{Initialized, init};

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let daemon = matches!(cli.command, Command::Volt { command: None, .. } | Command::Compute(_));
    start_logging(if daemon { "info" } else { "error" });
    if daemon {
        control::daemon::open_many_files();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            note(&format!("virtman: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(&cli));
    // A read of the terminal that is still blocked must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            note(&format!("virtman: {}", failure.message));
            ExitCode::FAILURE
        }
    }
}

/// Logs go to standard error; `VIRTMAN_LOG` sets what is logged, `VIRTMAN_LOG_FORMAT=json` how.
fn start_logging(default: &str) {
    let filter = EnvFilter::try_from_env("VIRTMAN_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let json = std::env::var("VIRTMAN_LOG_FORMAT").is_ok_and(|format| format == "json");
    if json {
        builder.json().init();
    } else {
        builder.with_target(false).with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
    }
}

async fn run(cli: &Cli) -> Outcome {
    let context = Context::new(&cli.global);
    let home = &cli.global.home;
    match &cli.command {
        Command::Volt { command: None, args } => {
            volt::run(&home.join("volt"), args).await.map_err(Failure::new)
        }
        Command::Volt { command: Some(command), .. } => volt(&context, home, command).await,
        Command::Compute(args) => node::run(&cli.global.node_dir(), args).await.map_err(Failure::new),
        Command::Image(command) => image::run(&context, command).await,
        Command::Create(args) => vm::create(&context, args).await,
        Command::Destroy { vms, instance_only } => {
            let destroy = if *instance_only { Destroy::InstanceOnly } else { Destroy::WithImage };
            vm::destroy(&context, vms, destroy).await
        }
        Command::List => vm::list(&context).await,
        Command::Show { vm } => details::show(&context, vm).await,
        Command::Clone(args) => clone::clone(&context, args).await,
        Command::Migrate(args) => migrate::run(&context, args).await,
        Command::Commit(args) => clone::commit(&context, args).await,
        Command::Snapshot(args) => snapshot::run(&context, args).await,
        Command::Export(command) => export::run(&context, command).await,
        Command::Cache(command) => cache::run(&context, command).await,
        Command::Boot(args) => boot::run(&context, args).await,
        Command::Stop(args) => vm::stop(&context, args).await,
        Command::Console { vm } => vm::attach_console(&context, vm).await,
        Command::Status => show::status(&context).await,
        Command::Tree { image } => show::tree(&context, image.as_ref()).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "virtman", &mut script);
            print(&String::from_utf8_lossy(&script));
            Ok(())
        }
        Command::Man { out } => manual(out)
            .map_err(|e| Failure::new(format!("cannot write manual pages into {}: {e}", out.display()))),
    }
}

async fn volt(context: &Context, home: &Path, command: &VoltCommand) -> Outcome {
    match command {
        VoltCommand::Init { admin, address } => {
            let name: AdminName =
                admin.as_str().parse().map_err(|e| Failure::new(format!("--admin: {e}")))?;
            let admin_dir = home.join("admin");
            match init(&home.join("volt"), &admin_dir, &name, address).map_err(Failure::new)? {
                Initialized::New => note(&format!(
                    "Created a cluster. Its authority is in {}: keep it secret and back it up.\nThe credentials of administrator '{admin}' are in {}.\nNext: 'virtman volt' runs the coordinator.",
                    home.join("volt").display(),
                    admin_dir.display()
                )),
                Initialized::Again => {
                    note(
                        "There was a cluster already: it was kept, and nodes reach Volt at the address given now.",
                    );
                }
            }
            Ok(())
        }
        VoltCommand::Token { valid, node } => {
            let valid_ms = u64::try_from(valid.as_millis()).ok();
            let body = NewToken { valid_ms, node: node.clone() };
            let issued: TokenIssued = context.volt()?.post("/v1/tokens", &body).await?;
            if context.json() {
                print_json(&issued);
            } else {
                say(&issued.token);
            }
            Ok(())
        }
        VoltCommand::Remove { node } => {
            context.volt()?.delete::<()>(&format!("/v1/nodes/{node}")).await?;
            context.done("removed", node, &format!("removed node '{node}' from the cluster"));
            Ok(())
        }
        VoltCommand::Pardon { node } => {
            context.volt()?.post::<()>(&format!("/v1/nodes/{node}/pardon"), &()).await?;
            context.done("pardoned", node, &format!("node '{node}' may serve others again"));
            Ok(())
        }
        VoltCommand::Openapi => {
            print_json(&volt::openapi());
            Ok(())
        }
    }
}

fn manual(out: &Path) -> io::Result<()> {
    fs::create_dir_all(out)?;
    clap_mangen::generate_to(Cli::command(), out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_consistent_and_every_command_and_option_is_explained() {
        fn explained(command: &clap::Command) {
            for argument in command.get_arguments().filter(|a| !a.is_hide_set()) {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            for sub in command.get_subcommands() {
                assert!(sub.get_about().is_some(), "{}", sub.get_name());
                explained(sub);
            }
        }
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        explained(&command);
    }
}
