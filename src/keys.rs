//! `capx keys`: API keys, straight on the database, for whoever runs the
//! server.

use anyhow::{Context, bail};
use capx_core::domain::ids::{AccountId, CompanyId, KeyId};
use capx_core::domain::key::{ApiKey, SCOPES};
use capx_core::store::tenants::{self, KeyGrant, NewKey};
use clap::Subcommand;
use rand::Rng;
use serde_json::json;
use sqlx::{PgConnection, PgPool};

use crate::out;

/// The account when none is named.
const DEFAULT_ACCOUNT: &str = "default";

/// `capx keys …`
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key and show it, this once.
    Create {
        /// For people, to tell keys apart.
        #[arg(long)]
        name: String,
        /// The account; made when it is new.
        #[arg(long, default_value = DEFAULT_ACCOUNT)]
        account: String,
        /// Bind the key to one company (co_…).
        #[arg(long)]
        company: Option<CompanyId>,
        /// What it may do, parted by commas; everything without.
        #[arg(long, value_delimiter = ',', default_value = "*")]
        scopes: Vec<String>,
        /// A sandbox key: spends no credits.
        #[arg(long)]
        test: bool,
        /// The tier of a new account.
        #[arg(long, default_value = "pro", value_parser = ["starter", "pro", "enterprise"])]
        tier: String,
        /// One JSON object with `id` and `key`.
        #[arg(long)]
        json: bool,
    },
    /// List the keys, masked.
    List {
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Make a key that may do the same as another, which is revoked.
    Rotate {
        /// The old key's id (key_…).
        id: KeyId,
        /// Leave the old key active; revoke it when all have switched.
        #[arg(long)]
        keep: bool,
        /// One JSON object with `id` and `key`.
        #[arg(long)]
        json: bool,
    },
    /// Revoke a key for good.
    Revoke {
        /// The key's id (key_…).
        id: KeyId,
    },
}

/// A key that has just been made.
#[derive(Debug)]
pub struct Made {
    /// Its id.
    pub id: KeyId,
    /// The key itself.
    pub key: String,
}

/// Makes a key of an account.
pub async fn make(
    pool: &PgPool,
    account: AccountId,
    company: Option<CompanyId>,
    name: &str,
    live: bool,
    scopes: &[String],
) -> anyhow::Result<Made> {
    let mut tx = pool.begin().await?;
    let grant = KeyGrant { account, company, name: name.to_owned(), live, scopes: scopes.to_vec() };
    let made = make_in(&mut tx, &grant).await?;
    tx.commit().await?;
    Ok(made)
}

async fn make_in(tx: &mut PgConnection, grant: &KeyGrant) -> anyhow::Result<Made> {
    let KeyGrant { account, company, name, live, scopes } = grant;
    // A generator seeded by the operating system, which is what it takes for
    // 220 bits that nobody can guess.
    let key = ApiKey::generate(*live, |below| rand::rng().random_range(0..below));
    let hint = key.hint();
    let new = NewKey { account: *account, company: *company, name, hash: key.hash(), hint: &hint, live: *live, scopes };
    let id = capx_core::engine::keys::create(tx, &new).await?;
    Ok(Made { id, key: key.reveal().to_owned() })
}

/// Makes a key that may do the same as another, which is revoked unless it is
/// kept.
pub async fn rotate(pool: &PgPool, old: KeyId, keep: bool) -> anyhow::Result<Made> {
    let mut tx = pool.begin().await?;
    let grant = tenants::grant_of(&mut tx, old).await?.with_context(|| format!("there is no active key {old}"))?;
    if !keep {
        tenants::revoke_key(&mut *tx, old).await?;
    }
    let made = make_in(&mut tx, &grant).await?;
    tx.commit().await?;
    Ok(made)
}

fn show(made: &Made, as_json: bool) {
    if as_json {
        out::line(json!({"id": made.id, "key": made.key}));
    } else {
        out::line(format_args!("{}\nid {}; the key is shown this once, keep it safe", made.key, made.id));
    }
}

/// Runs a command.
pub async fn run(pool: &PgPool, command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create { name, account, company, scopes, test, tier, json } => {
            if let Some(unknown) = scopes.iter().find(|scope| !SCOPES.contains(&scope.as_str())) {
                bail!("unknown scope `{unknown}`; the scopes are {}", SCOPES.join(", "));
            }
            let account = tenants::account(pool, &account, &tier).await?;
            if let Some(company) = company {
                tenants::company(pool, account, None, company)
                    .await?
                    .with_context(|| format!("the account has no company {company}"))?;
            }
            let made = make(pool, account, company, &name, !test, &scopes).await?;
            show(&made, json);
            Ok(())
        }
        KeysCommand::Rotate { id, keep, json } => {
            show(&rotate(pool, id, keep).await?, json);
            Ok(())
        }
        KeysCommand::List { json } => {
            let keys = tenants::list_keys(pool).await?;
            if json {
                let keys: Vec<_> = keys
                    .iter()
                    .map(|k| json!({"id": k.key, "name": k.name, "account": k.account, "key": k.hint, "scopes": k.scopes, "revoked": k.revoked}))
                    .collect();
                out::line(serde_json::Value::Array(keys));
                return Ok(());
            }
            let mut table = comfy_table::Table::new();
            table.load_style(comfy_table::presets::NOTHING);
            table.set_header(["ID", "NAME", "ACCOUNT", "KEY", "SCOPES", ""]);
            for key in keys {
                let state = if key.revoked { "revoked" } else { "" };
                table.add_row([
                    key.key.to_string(),
                    key.name,
                    key.account,
                    key.hint,
                    key.scopes.join(","),
                    state.to_owned(),
                ]);
            }
            out::line(table);
            Ok(())
        }
        KeysCommand::Revoke { id } => {
            if !tenants::revoke_key(pool, id).await? {
                bail!("there is no active key {id}");
            }
            out::line(format_args!("revoked {id}"));
            Ok(())
        }
    }
}
