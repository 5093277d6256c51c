//! The program `capx`.

use capx::serve::{self, DatabaseArgs, WorkerArgs};
use capx::{bench, telemetry};
use capx_core::store::{self, PoolKind};
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(name = "capx", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run jobs: one of any number of worker processes.
    Worker {
        #[command(flatten)]
        database: DatabaseArgs,
        #[command(flatten)]
        worker: WorkerArgs,
    },
    /// Bring the database's tables up to this version.
    Migrate {
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Measure this machine: jobs, steps, enqueues, latencies, idle cost.
    Bench(bench::BenchArgs),
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(cli))
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Worker { database, worker } => {
            telemetry::start("info");
            let url = database.url()?;
            let stop = serve::stop_signal()?;
            serve::check_database(&store::pool(&url, PoolKind::Requests, 1)?).await?;
            serve::worker(&url, &worker, false)?.run(stop).await;
            Ok(())
        }
        Command::Migrate { database } => {
            telemetry::start("info");
            let pool = store::pool(&database.url()?, PoolKind::Requests, 1)?;
            store::migrate(&pool).await?;
            tracing::info!("the database is up to date");
            Ok(())
        }
        Command::Bench(args) => {
            telemetry::start("warn");
            bench::run(args).await
        }
    }
}
