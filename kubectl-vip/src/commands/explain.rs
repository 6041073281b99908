//! `explain`: what a code means, where it comes from, and what helps. Needs no cluster.

use crate::cli::ExplainArgs;
use crate::codes;
use crate::exit::{Failure, Result};
use crate::output::{self, Table};

/// Runs the command.
pub fn run(args: &ExplainArgs) -> Result<()> {
    let Some(typed) = &args.code else {
        let mut table = Table::new(&["CODE", "SEVERITY", "MEANING"]);
        for code in codes::all() {
            table.row([code.id.to_owned(), code.severity.word().to_owned(), code.title.to_owned()]);
        }
        output::print(&table.render(false));
        return Ok(());
    };
    let code = codes::find(typed).map_err(|closest| {
        Failure::new(format!("there is no code {typed:?}{closest}"))
            .hint("kubectl vip explain lists all codes")
    })?;
    output::print(&code.explanation());
    Ok(())
}
