//! `capx audit`: holds the audit log against its chain, straight on the database.

use std::time::Instant;

use anyhow::{Context, bail};
use capx_core::domain::audit::{Link, Walk};
use capx_core::domain::digest::hex;
use capx_core::domain::ids::CompanyId;
use capx_core::store::audit;
use clap::Subcommand;
use serde_json::json;
use sqlx::PgPool;

use crate::out;

/// Entries that are read at once.
const PAGE: i64 = 5_000;

/// `capx audit …`
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Hold every entry against the one before it; 1 when anything was changed.
    Verify {
        /// Of one company (co_…); of all without.
        #[arg(long)]
        company: Option<CompanyId>,
        /// A file that `capx audit heads` has written before: a chain that was
        /// written anew since is found by it.
        #[arg(long)]
        heads: Option<std::path::PathBuf>,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Show where each company's chain ends, a line each: keep it outside.
    Heads,
}

/// Runs the command.
pub async fn run(pool: &PgPool, command: AuditCommand) -> anyhow::Result<()> {
    match command {
        AuditCommand::Heads => {
            for (company, seq, hash) in audit::heads(pool).await? {
                out::line(format!("{company} {seq} {}", hex(&hash)));
            }
            Ok(())
        }
        AuditCommand::Verify { company, heads, json } => verify(pool, company, heads, json).await,
    }
}

/// Where chains ended once, by company.
type Anchors = Vec<(CompanyId, i64, String)>;

fn anchors(path: &std::path::Path) -> anyhow::Result<Anchors> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let read = |(at, line): (usize, &str)| {
        let mut words = line.split_whitespace();
        let anchor = (|| Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.to_owned())))();
        anchor.with_context(|| format!("{}:{}: expected `co_… NUMBER HASH`", path.display(), at + 1))
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(read).collect()
}

async fn verify(
    pool: &PgPool,
    only: Option<CompanyId>,
    heads: Option<std::path::PathBuf>,
    as_json: bool,
) -> anyhow::Result<()> {
    let kept = heads.as_deref().map(anchors).transpose()?.unwrap_or_default();
    let (began, mut entries, mut faults) = (Instant::now(), 0, Vec::new());
    let mut of = audit::heads(pool).await?;
    of.retain(|(company, ..)| only.is_none_or(|only| only == *company));
    let lost = kept.iter().filter(|(company, ..)| !of.iter().any(|(known, ..)| known == company));
    faults.extend(
        lost.filter(|(company, ..)| only.is_none_or(|only| only == *company))
            .map(|(company, ..)| (*company, "its whole log is gone".to_owned())),
    );
    for (company, seq, hash) in &of {
        let anchors: Vec<_> = kept.iter().filter(|(kept, ..)| kept == company).collect();
        match walk(pool, *company, (*seq, hash), &anchors).await? {
            Ok(count) => entries += count,
            Err(fault) => faults.push((*company, fault)),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    if as_json {
        let faults: Vec<_> =
            faults.iter().map(|(company, fault)| json!({"company_id": company, "fault": fault})).collect();
        out::line(json!({"companies": of.len(), "entries": entries, "seconds": seconds, "faults": faults}));
    } else {
        for (company, fault) in &faults {
            out::line(format!("{company}: {fault}"));
        }
        out::line(format!(
            "{entries} entries of {} companies are whole ({seconds:.1} s)",
            of.len() - faults.len().min(of.len())
        ));
    }
    if !faults.is_empty() {
        bail!("the audit log was changed");
    }
    Ok(())
}

/// Follows one chain to its head, past what was kept of it outside.
async fn walk(
    pool: &PgPool,
    company: CompanyId,
    (seq, hash): (i64, &[u8]),
    anchors: &[&(CompanyId, i64, String)],
) -> anyhow::Result<Result<i64, String>> {
    let mut walk = Walk::new(company);
    loop {
        let page: Vec<Link> = audit::after(pool, company, walk.seq(), PAGE).await?;
        if page.is_empty() {
            break;
        }
        for link in &page {
            // What came since the head was read is another time's.
            if walk.seq() == seq {
                break;
            }
            if let Err(fault) = walk.follow(link) {
                return Ok(Err(fault));
            }
            let kept = anchors.iter().find(|(_, at, _)| *at == walk.seq());
            if kept.is_some_and(|(.., kept)| *kept != hex(walk.hash())) {
                return Ok(Err(format!(
                    "entry {} has another hash than was kept: the chain was written anew",
                    walk.seq()
                )));
            }
        }
        if walk.seq() == seq {
            break;
        }
    }
    if let Some((_, kept, _)) = anchors.iter().find(|(_, kept, _)| *kept > seq) {
        return Ok(Err(format!("the chain ends with entry {seq}, and entry {kept} was kept: its tail was cut")));
    }
    Ok(walk.ends_at(seq, hash).map(|()| seq))
}
