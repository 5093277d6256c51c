//! The program `capx`.

use std::process::ExitCode;

use capx::audit::{self, AuditCommand};
use capx::cli::approval::ApprovalCommand;
use capx::cli::client::{Client, ServerArgs};
use capx::cli::exit::{self, Exit};
use capx::cli::playbook::PlaybookCommand;
use capx::cli::run::RunCommand;
use capx::cli::secret::SecretCommand;
use capx::cli::webhook::WebhookCommand;
use capx::doctor::{self, DoctorArgs};
use capx::keys::KeysCommand;
use capx::serve::{self, DatabaseArgs, WorkerArgs};
use capx::{bench, cli, dev, keys, telemetry};
use capx_core::store::{self, PoolKind};
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(name = "capx", version, about, propagate_version = true, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything on this machine: a private PostgreSQL, the API, a
    /// worker and a demo company.
    Dev(dev::DevArgs),
    /// Serve the REST API: one of any number of API processes.
    Api {
        #[command(flatten)]
        database: DatabaseArgs,
        /// Where to listen.
        #[arg(long, env = "CAPX_BIND", default_value = serve::BIND)]
        bind: String,
    },
    /// Run jobs: one of any number of worker processes.
    Worker {
        #[command(flatten)]
        database: DatabaseArgs,
        #[command(flatten)]
        worker: WorkerArgs,
        /// Where to serve `/healthz`, `/readyz` and `/metrics`, e.g.
        /// 127.0.0.1:9090; nowhere by default.
        #[arg(long, env = "CAPX_WORKER_BIND")]
        bind: Option<String>,
    },
    /// Bring the database's tables up to this version.
    Migrate {
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Make, list and revoke API keys, straight on the database.
    Keys {
        #[command(flatten)]
        database: DatabaseArgs,
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// Hold the audit log against its chain, straight on the database.
    Audit {
        #[command(flatten)]
        database: DatabaseArgs,
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// Write, store, compare and run playbooks.
    #[command(after_help = exit::HELP)]
    Playbook {
        #[command(flatten)]
        server: ServerArgs,
        #[command(subcommand)]
        command: PlaybookCommand,
    },
    /// Look at runs, follow them, cancel them, let them go on.
    #[command(after_help = exit::HELP)]
    Run {
        #[command(flatten)]
        server: ServerArgs,
        #[command(subcommand)]
        command: RunCommand,
    },
    /// Decide what waits for a person.
    #[command(after_help = exit::HELP)]
    Approval {
        #[command(flatten)]
        server: ServerArgs,
        #[command(subcommand)]
        command: ApprovalCommand,
    },
    /// Set what `${secrets.NAME}` gives to tools.
    #[command(after_help = exit::HELP)]
    Secret {
        #[command(flatten)]
        server: ServerArgs,
        #[command(subcommand)]
        command: SecretCommand,
    },
    /// Tell other systems of what happens.
    #[command(after_help = exit::HELP)]
    Webhook {
        #[command(flatten)]
        server: ServerArgs,
        #[command(subcommand)]
        command: WebhookCommand,
    },
    /// Show what there is, what is under way, and what stands still and why.
    #[command(after_help = exit::HELP)]
    Status {
        #[command(flatten)]
        server: ServerArgs,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Show every limit with its name and default.
    Doctor(DoctorArgs),
    /// Measure this machine: jobs, steps, enqueues, latencies, idle cost, the API.
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    // Before there is any thread, which a new namespace of users does not allow.
    if let Some(code) = capx_workers::sandbox::enter() {
        return code;
    }
    let cli = Cli::parse();
    let ended = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        // On a worker thread, where what a socket wakes goes on at once.
        .and_then(|runtime| runtime.block_on(async { tokio::spawn(run(cli)).await? }));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            // As a shell tells a Ctrl-C.
            match error.downcast_ref::<Exit>() {
                Some(exit) => ExitCode::from(exit.code),
                None if error.is::<dev::Interrupted>() => ExitCode::from(130),
                None => ExitCode::FAILURE,
            }
        }
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a command that failed")]
fn complain(error: &anyhow::Error) {
    eprintln!("capx: {error:#}");
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    serve::raise_open_files();
    match cli.command {
        Command::Dev(args) => {
            telemetry::start("warn");
            dev::run(args).await
        }
        Command::Api { database, bind } => {
            telemetry::start("info");
            let url = database.url()?;
            let stop = serve::stop_signal()?;
            let keyring = serve::keyring()?;
            serve::check_database(&store::pool(&url, PoolKind::Owner, 1)?).await?;
            let listener = serve::listen(&bind).await?;
            tracing::info!(address = %listener.local_addr()?, "the API listens");
            serve::api(listener, serve::api_state(&url, keyring, serve::metrics()?, stop)?).await
        }
        Command::Worker { database, worker, bind } => {
            telemetry::start("info");
            let url = database.url()?;
            let stop = serve::stop_signal()?;
            let keyring = serve::keyring()?;
            serve::check_database(&store::pool(&url, PoolKind::Owner, 1)?).await?;
            if let Some(bind) = bind {
                serve::health(&url, &bind, &stop).await?;
            }
            let worker = serve::worker(&url, &worker, keyring, false).await?;
            tracing::info!("the worker runs");
            worker.run(stop).await?;
            Ok(())
        }
        Command::Migrate { database } => {
            telemetry::start("info");
            let pool = store::pool(&database.url()?, PoolKind::Owner, 1)?;
            store::migrate(&pool).await?;
            tracing::info!("the database is up to date");
            Ok(())
        }
        Command::Keys { database, command } => {
            telemetry::start("warn");
            let pool = store::pool(&database.url()?, PoolKind::Owner, 1)?;
            keys::run(&pool, command).await
        }
        Command::Audit { database, command } => {
            telemetry::start("warn");
            audit::run(&store::pool(&database.url()?, PoolKind::Owner, 1)?, command).await
        }
        Command::Playbook { server, command } => cli::playbook::run(server, command).await,
        Command::Run { server, command } => cli::run::run(&Client::new(server)?, command).await,
        Command::Approval { server, command } => cli::approval::run(&Client::new(server)?, command).await,
        Command::Webhook { server, command } => cli::webhook::run(&Client::new(server)?, command).await,
        Command::Secret { server, command } => cli::secret::run(server, command).await,
        Command::Status { server, json } => cli::status::run(&Client::new(server)?, json).await,
        Command::Doctor(args) => {
            doctor::run(&args);
            Ok(())
        }
        Command::Bench(args) => {
            telemetry::start("warn");
            bench::run(args).await
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
